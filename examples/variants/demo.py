#!/usr/bin/env python3
"""Find the variants of a phage on a cluster: align reads in chunks, one task each, merge, call, compare.

The work directory must be one that all nodes see; in a cluster on one machine any directory is. Interrupting it
(Ctrl-C) cancels what it has submitted. It ends with 0 when every task succeeded and the result is the same as that of
`pipeline.sh`, which runs the same steps here without the cluster. With --image the tasks run in containers, which see
nothing of the node but the work directory, the steps and the reads.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from spinetta.client import Client, Mount, TaskInfo, make_spec
from spinetta.errors import NotFound, SpinettaError
from spinetta.model import State, TaskId, TaskSpec

HERE = Path(__file__).resolve().parent
EXAMPLES = Path("/usr/share/doc/bowtie2/examples")
STDERR_SHOWN_BYTES = 2000
CHUNKS_MAX = 999  # steps.sh numbers them with three digits
LINE_EVERY_S = 1.0  # progress where it cannot be redrawn


class StepFailed(Exception):
    """A task of ours did not succeed; the text tells which and why."""


@dataclass
class Stage:
    """Tasks that may run at the same time, and what became of them."""

    title: str
    commands: Sequence[tuple[str, Sequence[str]]]
    tasks: dict[TaskId, TaskInfo | None] = field(default_factory=dict)
    took_s: float = 0.0

    def ended(self) -> list[TaskInfo]:
        """Those that have ended."""
        return [t for t in self.tasks.values() if t is not None and t.done]

    def line(self) -> str:
        """Where it stands, e.g. ``align 7/24   running: n1 2, n3 1   done: n1 4, n2 3``."""
        running = Counter(t.node for t in self.tasks.values() if t is not None and t.task.state is State.RUNNING)
        done = Counter(t.node for t in self.ended())
        parts = [f"  {self.title:<8} {done.total():>3}/{len(self.commands)}"]
        parts += [f"{label}: {per_node(count)}" for label, count in (("running", running), ("done", done)) if count]
        return "   ".join(parts)


def per_node(count: Counter[str]) -> str:
    """E.g. ``n1 8, n2 8``."""
    return ", ".join(f"{node} {n}" for node, n in sorted(count.items()))


class Progress:
    """One line that is redrawn on a terminal; elsewhere a new one now and then."""

    def __init__(self) -> None:
        self._redraw = sys.stdout.isatty()
        self._last_s = 0.0
        self._drawn = False

    def show(self, line: str, *, final: bool = False) -> None:
        """The state now; `final`: this one must be seen and stays."""
        now_s = time.monotonic()
        if self._redraw:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r{line[:width]:<{width}}", end="\n" if final else "", flush=True)
            self._drawn = not final
        elif final or now_s - self._last_s >= LINE_EVERY_S:
            print(line, flush=True)
            self._last_s = now_s

    def leave(self) -> None:
        """Whatever is printed next begins on a line of its own."""
        if self._drawn:
            print()
            self._drawn = False


class Places:
    """Where tasks find what lies here: at the same paths, or where their containers have it mounted."""

    INSIDE = "/variants"

    def __init__(self, image: str, work: Path, read_only: Sequence[Path]) -> None:
        """`image` is empty when there are no containers. `work` is what tasks may write to."""
        self.image = image
        self._inside = {work: f"{self.INSIDE}/run"}
        for n, folder in enumerate(dict.fromkeys(read_only), 1):
            self._inside.setdefault(folder, f"{self.INSIDE}/given-{n}")
        self.mounts = [Mount(str(here), there, here == work) for here, there in self._inside.items()] if image else []

    def of(self, path: Path) -> str:
        """The path of a file as a task knows it."""
        if self.image:
            for here, there in self._inside.items():
                if path.is_relative_to(here):
                    return str(there / path.relative_to(here))
        return str(path)

    def make(self, folder: Path) -> None:
        """A folder that tasks may write to. In a container they are another user, whom nobody else here is."""
        folder.mkdir(exist_ok=True)
        if self.image:
            folder.chmod(0o777)


class Pipeline:
    """Runs stages on a cluster, one after the other: the next begins when all tasks of one have succeeded."""

    def __init__(self, client: Client, run: str, places: Places) -> None:
        self._client = client
        self._run = run
        self.places = places
        self._progress = Progress()
        self.stages: list[Stage] = []

    def spec(self, name: str, command: Sequence[str]) -> TaskSpec:
        """One core, half a gigabyte; found again by its label."""
        return make_spec(
            ["bash", self.places.of(HERE / "steps.sh"), *command],
            name=name,
            labels={"demo": "variants", "run": self._run},
            env={"PATH": "/usr/local/bin:/usr/bin:/bin"},
            cpus=1,
            memory="512MiB",
            time="10m",
            image=self.places.image,
            mounts=self.places.mounts,
        )

    def run(self, stage: Stage) -> None:
        """Submit a stage and follow it to its end.

        Raises:
            StepFailed: a task failed; the others have been cancelled.
        """
        self.stages.append(stage)
        specs = [self.spec(name, command) for name, command in stage.commands]
        stage.tasks = {spec.id: None for spec in specs}
        began_s = time.monotonic()
        self._client.submit_many(specs)
        for changes in self._client.watch(ids=list(stage.tasks)):
            stage.tasks.update((task.id, task) for task in changes.tasks)
            failed = next((t for t in stage.ended() if not t.succeeded), None)
            if failed is not None:
                self._progress.leave()
                self.cancel()
                raise StepFailed(self._story(failed))
            over = len(stage.ended()) == len(stage.tasks)
            self._progress.show(stage.line(), final=over)
            if over:
                break
        stage.took_s = time.monotonic() - began_s

    def cancel(self) -> int:
        """Cancel what has not ended; how many that were."""
        self._progress.leave()
        open_ids = [i for stage in self.stages for i, t in stage.tasks.items() if t is None or not t.done]
        try:
            return self._cancelled(open_ids)
        except NotFound:  # the submit itself was interrupted: take those that are there one by one
            count = 0
            for task_id in open_ids:
                with contextlib.suppress(NotFound):
                    count += self._cancelled([task_id])
            return count

    def _cancelled(self, ids: Sequence[str]) -> int:
        if not ids:
            return 0
        return sum(not c.was_complete for c in self._client.cancel(ids, "the demonstration was stopped"))

    def _story(self, task: TaskInfo) -> str:
        t = task.task
        last = t.attempts[-1] if t.attempts else None
        how = f"exit code {last.exit_code}" if last and last.exit_code is not None else t.reason
        errors = b"".join(c.data for c in self._client.log(task.id, stream="stderr", tail_bytes=STDERR_SHOWN_BYTES))
        return (
            f"{t.spec.name} ({task.id}) on {task.node or 'no node'}: {t.outcome.name.lower()}, {how}. {t.message}\n"
            f"The end of its standard error:\n{errors.decode(errors='replace')}"
        )

    def table(self) -> str:
        """Stage, tasks, seconds, nodes."""
        rows = [("stage", "tasks", "seconds", "CPU seconds", "tasks of each node")]
        for stage in self.stages:
            last = [(t.node, t.task.attempts[-1].usage) for t in stage.ended() if t.task.attempts]
            cpu_s = sum(u.cpu_user_s + u.cpu_system_s for _, u in last)
            nodes = per_node(Counter(node for node, _ in last))
            rows.append((stage.title, str(len(stage.tasks)), f"{stage.took_s:.2f}", f"{cpu_s:.2f}", nodes))
        return "\n".join(f"  {a:<8} {b:>6} {c:>9} {d:>13}   {e}" for a, b, c, d, e in rows)


def records(vcf: Path) -> list[str]:
    """The variants of a VCF file, without its headers."""
    return [line for line in vcf.read_text().splitlines() if line and not line.startswith("#")]


def find_variants(pipeline: Pipeline, work: Path, chunks: int, reads: Sequence[Path], reference: Path) -> list[str]:
    """The whole pipeline; the variants it finds."""
    of, parts = pipeline.places.of, work / "chunks"
    (work / "reference.fa").write_bytes(gzip.decompress(reference.read_bytes()))
    fasta, index = of(work / "reference.fa"), of(work / "index")
    pipeline.places.make(parts)
    split = [(f"split {n}", ("split", of(path), str(chunks), of(parts / f"{n}"))) for n, path in enumerate(reads, 1)]
    pipeline.run(Stage("prepare", [("index", ("index", fasta, index)), *split]))
    numbers = sorted(path.name.split(".")[1] for path in parts.glob("1.*.fq.gz"))
    pairs = {n: [of(parts / f"{mate}.{n}.fq.gz") for mate in (1, 2)] for n in numbers}
    pipeline.run(Stage("align", [(f"align {n}", ("align", index, *pairs[n], of(parts / f"{n}.bam"))) for n in numbers]))
    bam, vcf = work / "all.bam", work / "variants.vcf"
    bams = [of(parts / f"{n}.bam") for n in numbers]
    pipeline.run(Stage("merge", [("merge", ("merge", of(bam), *bams))]))
    pipeline.run(Stage("call", [("call", ("call", fasta, of(bam), of(vcf)))]))
    return records(vcf)


def reference_variants(work: Path, reads: Sequence[Path], reference: Path) -> list[str]:
    """What the same steps find here, without a cluster."""
    program = [str(HERE / "pipeline.sh"), str(work), *map(str, reads), str(reference)]
    done = subprocess.run(program, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        raise StepFailed(f"pipeline.sh ended with {done.returncode}:\n{done.stderr[-STDERR_SHOWN_BYTES:]}")
    return records(work / "variants.vcf")


def demonstrate(args: argparse.Namespace) -> int:
    """Run it, compare, say what came of it."""
    args.work.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="run-", dir=args.work.resolve()))
    reads = [args.reads_1.resolve(), args.reads_2.resolve()]
    places = Places(args.image, work, [HERE, *(path.parent for path in reads)])
    places.make(work)
    credentials = os.environ.get("SPINETTA_CREDENTIALS", "none")
    with Client(args.nodes, credentials=None if credentials in ("", "none") else credentials) as client:
        nodes = [n.record for n in client.nodes().nodes if n.status == "ready"]
        cores = sum(n.capacity.cpu_millis for n in nodes) / 1000
        print(f"{len(nodes)} nodes ({', '.join(n.name for n in nodes)}), {cores:g} cores; files in {work}", flush=True)
        if args.image:
            print(f"tasks run in containers of {args.image}", flush=True)
        pipeline = Pipeline(client, work.name, places)
        began_s = time.monotonic()
        try:
            found = find_variants(pipeline, work, args.chunks, reads, args.reference)
        except KeyboardInterrupt:
            print(f"stopped; {pipeline.cancel()} tasks cancelled", file=sys.stderr)
            return 130
        took_s = time.monotonic() - began_s
    print(f"\n{pipeline.table()}\n")
    print(f"  {len(found)} variants on the cluster, after {took_s:.1f} s", flush=True)
    began_s = time.monotonic()
    expected = reference_variants(work / "without-cluster", reads, args.reference)
    print(f"  {len(expected)} variants without it (pipeline.sh), after {time.monotonic() - began_s:.1f} s")
    shutil.rmtree(work / "chunks")
    shutil.rmtree(work / "without-cluster")
    if found != expected:
        print(f"  DIFFERENT: {len(set(found) ^ set(expected))} records are in one of the two only")
        return 1
    print(f"  the records are the same: {work / 'variants.vcf'}")
    return 0


def main() -> int:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=24, help="parts to split the reads in, one task each (24)")
    parser.add_argument("--image", default="", help="run the tasks in containers of this image (scripts/demo-image.sh)")
    parser.add_argument("--work", type=Path, default=Path("demo"), help="directory that all nodes see (./demo)")
    parser.add_argument(
        "--nodes",
        default=os.environ.get("SPINETTA_NODE", "127.0.0.1:7220"),
        help="API addresses, with commas between ($SPINETTA_NODE, else 127.0.0.1:7220)",
    )
    parser.add_argument("--reads-1", type=Path, default=EXAMPLES / "reads/reads_1.fq.gz", help="FASTQ, gzip")
    parser.add_argument("--reads-2", type=Path, default=EXAMPLES / "reads/reads_2.fq.gz", help="their mates")
    parser.add_argument("--reference", type=Path, default=EXAMPLES / "reference/lambda_virus.fa.gz", help="FASTA, gzip")
    args = parser.parse_args()
    if not 1 <= args.chunks <= CHUNKS_MAX:
        parser.error(f"--chunks: 1 to {CHUNKS_MAX}")
    for path in (args.reads_1, args.reads_2, args.reference):
        if not path.is_file():
            parser.error(
                f"{path} is not there (Debian's bowtie2-examples has the defaults; scripts/setup.sh installs it)"
            )
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # being told to end cancels the tasks, too
    try:
        return demonstrate(args)
    except (SpinettaError, StepFailed) as e:
        print(f"demo: {e}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
