#!/usr/bin/env bash
# The reference: the whole pipeline on this machine, without Spinetta and without splitting the reads.
#
#   pipeline.sh DIRECTORY [READS_1 READS_2 REFERENCE]
#
# Leaves DIRECTORY/variants.vcf and prints the number of variants. Without further arguments: the lambda phage genome
# and reads of Debian's bowtie2-examples.
set -euo pipefail
export LC_ALL=C

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
examples=/usr/share/doc/bowtie2/examples
work=${1:?a directory is needed}
reads_1=${2:-$examples/reads/reads_1.fq.gz}
reads_2=${3:-$examples/reads/reads_2.fq.gz}
reference=${4:-$examples/reference/lambda_virus.fa.gz}

mkdir -p "$work"
zcat -f "$reference" >"$work/reference.fa"
"$here/steps.sh" index "$work/reference.fa" "$work/index"
"$here/steps.sh" align "$work/index" "$reads_1" "$reads_2" "$work/part.bam"
"$here/steps.sh" merge "$work/all.bam" "$work/part.bam"
"$here/steps.sh" call "$work/reference.fa" "$work/all.bam" "$work/variants.vcf"
