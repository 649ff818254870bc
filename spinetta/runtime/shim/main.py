"""The shim's life: detach, sweep what an earlier one left, serve, end."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path

from . import container, detach, proctable, remains, secretfiles, sysapi
from .attempt import Held, Phase, make_exit
from .bundle import WORK
from .cgroup import Cgroups, Limits, sweep
from .connection import listen
from .disk import Layout, Writer
from .keeper import Keeper
from .loop import READ, WRITE, Loop, now_s
from .records import is_key, put_aside, read_records
from .remains import Swept
from .server import Identity, Server
from .spawn import Surroundings
from .wire import LIMITS, OPEN_FILES_LIMIT

ORPHANS_AGAIN_S = 1.0
IDLE_LOOKS_PER_WAIT = 4
END_SWEEP_S = 2.0
WRITER_AGAIN_S = 1.0  # a writer that dies at once, or cannot be started, is not tried in a loop
_IGNORED = ("HUP", "INT", "QUIT", "TERM", "USR1", "USR2", "TSTP", "TTIN", "TTOU", "PIPE", "XFSZ")


def main(arguments: list[str]) -> int:
    """Start with one argument, the configuration as JSON. What comes of it is one JSON line on standard output."""
    config = json.loads(arguments[0])
    layout = Layout(
        Path(config["state_dir"]), **{name: Path(config[name]) for name in ("logs", "kept") if name in config}
    )
    try:
        layout.make()
        lock_fd = detach.take_lock(layout.root, lambda: remains.read_identity(layout.root))
        swept = remains.sweep_remains(layout, str(config["node"]))
        around = detach.detach(lock_fd, isolate=config["isolate"])
    except detach.CannotStart as problem:
        _say({problem.kind: str(problem)})
        return 1
    except OSError as error:
        _say({"failed": str(error)})
        return 1
    try:
        shim = Shim(layout, swept, around, config)
    except OSError as error:
        _say({"failed": str(error)})
        return 1
    _say({"ready": shim.identity.shim})
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    os.dup2(null, 1)
    shim.run()
    return 0


def _say(message: dict[str, str]) -> None:
    os.write(1, json.dumps(message).encode() + b"\n")


class Shim:
    """Everything put together."""

    def __init__(self, layout: Layout, swept: Swept, around: detach.Detached, config: dict[str, object]) -> None:
        self._layout = layout
        self._swept = swept
        node, kill_margin_s = str(config["node"]), float(str(config["kill_margin_s"]))
        self._warnings: list[str] = [*around.warnings, *swept.warnings]
        for name in _IGNORED:
            signal.signal(getattr(signal, f"SIG{name}"), signal.SIG_IGN)
        nofile = resource.getrlimit(resource.RLIMIT_NOFILE)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (nofile[1], nofile[1]))
        core = resource.getrlimit(resource.RLIMIT_CORE)
        resource.setrlimit(resource.RLIMIT_CORE, (0, core[1]))  # secrets pass through our memory
        shim = os.urandom(8).hex()
        # Before any group is made: one that is not written down would never be found again should we die now.
        self._code = str(config.get("code", ""))
        self._write_identity(shim, around, remains.intended_groups(swept))
        self._cgroups = Cgroups(swept.name, swept.trees, swept.problems)
        self._place = secretfiles.find_place(layout.root, swept.name)
        self._containers = container.find_place(
            layout.root, swept.name, self._cgroups, swept.all_trees, isolated=around.isolated
        )
        self._claim_priority()
        leftovers = self._leftovers()
        self.identity = Identity(
            shim=shim,
            node=node,
            capabilities=self._capabilities(around),
            warnings=tuple(self._warnings),
            code=self._code,
            release=str(config.get("release", "")),
            started_ms=time.time_ns() // 1_000_000,
        )
        self._write_identity(shim, around, [*map(str, self._folders()), *swept.stuck])
        os.chdir("/")
        self._listening = listen(layout.root)
        self._loop = Loop(self._log)
        self._writer = Writer(layout, around.lock_fd)
        self._writer_started_s = now_s()
        self._keeper = Keeper(
            self._loop,
            layout,
            self._writer,
            self._cgroups,
            Surroundings(
                around.outer_proc,
                around.isolated,
                nofile,
                core,
                self._place,
                {} if around.isolated else {remains.MARK: swept.name},
                self._containers,
            ),
            kill_margin_s,
            self._log,
        )
        for held in leftovers:
            self._keeper.adopt_ended(held)
        self._server = Server(self._loop, self._listening, self._keeper, layout, self.identity, self._log)
        self._idle_end_s = float(str(config["idle_end_s"]))
        self._janitor = 0
        self._keeper.ending.helpers = lambda: (
            {self._writer.pid, self._janitor, self._keeper.watcher.pid} | self._keeper.containers.helpers
        )
        self._orphans_later = False

    def run(self) -> None:
        """Serve until told to end."""
        self._loop.on_child(self._reap_orphans)
        self._watch_writer()
        self._loop.on_turn = self._after_turn
        self._empty_trash()
        if left := secretfiles.left_over(self._swept.name):
            self._remove_all_in(left)
        self._end_when_idle()
        gc.collect()
        gc.freeze()  # children share these pages
        self._log(f"shim {self.identity.shim} of node {self.identity.node} serves; " + "; ".join(self._warnings))
        self._loop.run()
        # Not only the common folders: the group of an attempt that has just ended may have refused to go until now.
        for folder in sweep(self._folders(), END_SWEEP_S):
            self._log(f"{folder} cannot be removed; the next start of a shim will try again")
        self._log("ended")
        self._writer.finish()
        with contextlib.suppress(OSError):
            (self._layout.root / "shim.sock").unlink()
        secretfiles.remove_folder(self._place)

    # Starting ----------------------------------------------------------------------------------------------------

    def _claim_priority(self) -> None:
        """What helps us to get the CPU within the kill margin, as far as we may."""
        lacking = []
        try:
            sysapi.lock_memory()
        except OSError:
            lacking.append("locked memory")
        if not sysapi.raise_priority():
            lacking.append("priority over the tasks")
        try:
            Path("/proc/self/oom_score_adj").write_text("-1000")
        except OSError:
            lacking.append("protection when memory runs out")
        if lacking:
            self._warnings.append(f"the shim runs without {', '.join(lacking)}: it may kill late on a loaded machine")

    def _capabilities(self, around: detach.Detached) -> tuple[str, ...]:
        by_reason: dict[str, list[str]] = {}  # often one for all of them, and a long one
        for name, reason in self._cgroups.missing.items():
            by_reason.setdefault(reason, []).append(name)
        for reason, names_ in by_reason.items():
            self._warnings.append(f"{', '.join(names_)} {'is' if len(names_) == 1 else 'are'} missing: {reason}")
        if "cgroup-kill" in self._cgroups.missing:
            self._warnings.append("without cgroups a process that a task detaches may outlive it")
        names = ["process", *LIMITS, OPEN_FILES_LIMIT, *self._cgroups.capabilities]
        if around.isolated:
            names.append("pid-namespace")
        if self._place:
            names.append(secretfiles.CAPABILITY)
        else:
            self._warnings.append(f"{secretfiles.CAPABILITY} is missing: {self._place.why}")
        self._warnings += self._containers.warnings
        return (*names, *self._containers.capabilities)

    def _folders(self) -> list[Path]:
        """All control groups of ours that others are in."""
        return [*self._cgroups.folders, *self._containers.extra]

    def _write_identity(self, shim: str, around: detach.Detached, groups: list[str]) -> None:
        identity = {
            "shim": shim,
            "pid": around.outer_pid,
            "start_ticks": around.start_ticks,
            "boot_id": proctable.boot_id(),
            "cgroup_name": self._swept.name,
            "cgroups": groups,
            "code": self._code,
        }
        remains.write_identity(self._layout.root, identity)

    def _leftovers(self) -> list[Held]:
        """Ends that were never forgotten, and those that the shim before us did not live to see."""
        leftovers, scratches = [], set()
        for service, folder in ((False, self._layout.attempts), (True, self._layout.services)):
            records = read_records(folder)
            scratches |= {f"service@{name}" if service else name for name in (*records.found, *records.broken)}
            for name in records.broken:
                aside = put_aside(folder / name, self._layout.broken)
                where = f"is now {aside}" if aside else "cannot be moved away"
                self._warnings.append(
                    f"the record {folder / name} was damaged and {where}: how it ended is not known, and it counts as "
                    "lost with the shim; look at the disk, then remove the file"
                )
                if is_key(name):
                    records.found[name] = {"damaged": True}
            leftovers += [_from_record(self._layout, service, name, record) for name, record in records.found.items()]
        remains.clear_scratch(self._layout, scratches)
        return leftovers

    # Running -----------------------------------------------------------------------------------------------------

    def _log(self, text: str) -> None:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self._writer.log(f"{stamp} {text}\n")

    def _watch_writer(self) -> None:
        self._writer_mask = READ
        self._loop.watch(self._writer.sock.fileno(), READ, self._writer_ready)

    def _writer_ready(self, mask: int) -> None:
        if mask & WRITE:
            self._writer.flush()
        answers = self._writer.answers()
        if answers is None:
            self._loop.unwatch(self._writer.sock.fileno())
            self._writer.died()
            if now_s() - self._writer_started_s < WRITER_AGAIN_S:
                self._loop.call_in(WRITER_AGAIN_S, self._restart_writer)
            else:
                self._restart_writer()
            return
        for ack, error in answers:  # one that fails is not to keep what was answered to others
            self._loop.guarded(lambda ack=ack, error=error: ack(error))  # type: ignore[misc]  # defaults bind now

    def _restart_writer(self) -> None:
        """Until it works: what is to be written waits, and all else goes on."""
        self._writer_started_s = now_s()
        try:
            self._writer.start()
        except OSError:
            self._loop.call_in(WRITER_AGAIN_S, self._restart_writer)
            return
        self._watch_writer()
        self._log("the writing process died and was started again")

    def _after_turn(self) -> None:
        if self._keeper.trash_waits and not self._janitor:
            self._empty_trash()
        if not self._writer.up:
            return
        mask = READ | WRITE if self._writer.wants_to_write else READ
        if mask != self._writer_mask:
            self._writer_mask = mask
            self._loop.watch(self._writer.sock.fileno(), mask, self._writer_ready)

    def _reap_orphans(self) -> None:
        """We are init here: reap all that became ours, but not the main processes, whose exits are not recorded yet."""
        while True:
            try:
                dead = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if dead is None:
                return
            if dead.si_pid in self._keeper.ending.unreaped:
                break
            self._reap(dead.si_pid)
        # The kernel shows one dead child at a time, and this one has to wait. Look behind it, but not at every signal.
        if not self._orphans_later:
            self._orphans_later = True
            self._loop.call_in(ORPHANS_AGAIN_S, self._reap_hidden_orphans)

    def _reap_hidden_orphans(self) -> None:
        self._orphans_later = False
        me = os.getpid()
        for process in proctable.read_all():
            if process.parent == me and process.state == "Z" and process.pid not in self._keeper.ending.unreaped:
                self._reap(process.pid)
        self._reap_orphans()

    def _reap(self, pid: int) -> None:
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG)
        if pid == self._janitor:
            self._janitor = 0

    def _end_when_idle(self) -> None:
        """A shim that holds nothing and has nobody to talk to is of no use: the next daemon starts another."""
        quiet_since_s = self._server.quiet_since_s
        if quiet_since_s is not None and now_s() - quiet_since_s >= self._idle_end_s and self._keeper.idle:
            self._log("nothing to hold and nobody to talk to")
            self._keeper.closing = True
            self._server.close()
            self._loop.stop()
            return
        self._loop.call_in(self._idle_end_s / IDLE_LOOKS_PER_WAIT, self._end_when_idle)

    def _empty_trash(self) -> None:
        """Remove what tasks left in their scratch directories, in a process of its own: it may take long."""
        self._keeper.trash_waits = False
        with contextlib.suppress(OSError):
            self._janitor = os.fork()
            if self._janitor == 0:
                detach.become_remover(self._layout.trash)

    def _remove_all_in(self, folder: Path) -> None:
        with contextlib.suppress(OSError):
            names = os.listdir(folder)  # noqa: PTH208 - only names; before the fork: what is made from now on is not to go
            if os.fork() == 0:
                detach.become_remover(folder, names)


def _from_record(layout: Layout, service: bool, name: str, record: dict[str, object]) -> Held:
    end = record.get("exit")
    recorded = record.get("state") == "ended" and isinstance(end, dict)
    started_ms, token = record.get("started_ms"), record.get("token")
    held = Held(
        key=name,
        service=service,
        argv=[],
        env={},
        cwd="",
        stdout="",
        stderr="",
        record_path=(layout.services if service else layout.attempts) / name,
        scratch=None if service else layout.scratch / name,
        limits=Limits(),
        walltime_s=0.0,
        grace_s=0.0,
        stop_wait_s=0.0,
        token=token if isinstance(token, int) else 0,
        incarnation=str(record.get("incarnation", "")),
    )
    held.started_ms = started_ms if isinstance(started_ms, int) else 0
    keep_s = record.get("keep_scratch_s")
    held.keep_scratch_s = keep_s if isinstance(keep_s, int) and not service else 0
    held.keep_part = WORK if record.get("keep_part") == WORK else ""
    held.phase, held.recorded, held.has_intent = Phase.ENDED, recorded, True
    held.exit = (
        end
        if recorded and isinstance(end, dict)
        else make_exit(
            "shim-lost",
            message="its record was damaged" if "damaged" in record else "ended with the shim that held it",
            started_ms=held.started_ms,
        )
    )
    return held


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
