#!/usr/bin/env bash
# The steps of the pipeline, one a call. `pipeline.sh` runs them here, `demo.py` as tasks of a cluster: they are the
# same commands, so the two results can be compared.
#
#   steps.sh index REFERENCE INDEX               build the bowtie2 index INDEX.*
#   steps.sh split READS CHUNKS PREFIX           READS (FASTQ, gzip) → PREFIX.000.fq.gz … in CHUNKS parts
#   steps.sh align INDEX READS_1 READS_2 BAM     align pairs, sort by position
#   steps.sh merge BAM PARTS…                    one sorted and indexed BAM of many
#   steps.sh call REFERENCE BAM VCF              variants
#
# A step writes beside its target and renames at the end, so that a killed attempt leaves nothing half done to read.
# bowtie2's choices depend on the read alone (its name, bases and qualities), so splitting the reads changes nothing.
set -euo pipefail
export LC_ALL=C

step=$1
shift
case $step in
    index)
        reference=$1 index=$2
        # Its parts are many files: build in a directory of our own and move them.
        scratch=$(mktemp -d "$index.XXXXXX")
        trap 'rm -rf "$scratch"' EXIT
        bowtie2-build --quiet --threads 1 "$reference" "$scratch/index"
        for part in "$scratch"/index.*; do mv -f "$part" "$index${part#"$scratch/index"}"; done
        ;;
    split)
        reads=$1 chunks=$2 prefix=$3
        lines=$(zcat "$reads" | wc -l)
        [ $((lines % 4)) -eq 0 ] || { echo "$reads: $lines lines, not a multiple of 4" >&2 && exit 1; }
        size=$(((lines / 4 + chunks - 1) / chunks))
        # shellcheck disable=SC2016  # $FILE belongs to split
        zcat "$reads" | split --lines=$((4 * size)) --numeric-suffixes --suffix-length=3 --additional-suffix=.fq.gz \
            --filter='gzip -1 >"$FILE.new" && mv "$FILE.new" "$FILE"' - "$prefix."
        echo "$((lines / 4)) reads in chunks of $size"
        ;;
    align)
        index=$1 reads_1=$2 reads_2=$3 bam=$4
        trap 'rm -f "$bam.$$"' EXIT
        bowtie2 --very-sensitive --threads 1 -x "$index" -1 "$reads_1" -2 "$reads_2" |
            samtools sort --no-PG -O bam -T "$bam.sort.$$" -o "$bam.$$" -
        mv -f "$bam.$$" "$bam"
        ;;
    merge)
        bam=$1
        shift
        trap 'rm -f "$bam.$$"' EXIT
        samtools merge --no-PG -f -O bam "$bam.$$" "$@"
        mv -f "$bam.$$" "$bam"
        samtools index "$bam"
        ;;
    call)
        reference=$1 bam=$2 vcf=$3
        trap 'rm -f "$vcf.$$"' EXIT
        # A depth limit above what is there, or the reads that happen to come first would be the ones that count.
        bcftools mpileup --no-version --max-depth 10000 --output-type u --fasta-ref "$reference" "$bam" |
            bcftools call --no-version --multiallelic-caller --variants-only --ploidy 1 --output-type v \
                --output "$vcf.$$"
        mv -f "$vcf.$$" "$vcf"
        echo "$(grep -vc '^#' "$vcf" || true) variants"
        ;;
    *)
        echo "steps.sh: no step $step" >&2
        exit 2
        ;;
esac
