"""The container runtime: images and OCI configurations for the shim, which holds containers as it holds processes."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import stat
import tempfile
import time
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from spinetta import devices as device_units
from spinetta import imageref, ociconfig, ocirequest
from spinetta.container import (
    CONTAINER,
    ROOT,
    ContainerSpec,
    Mount,
    is_granted,
    mount_need,
    needs,
    network_need,
    refusals,
)
from spinetta.errors import RuntimeUnavailable, UserError
from spinetta.model import Exit, Reason, Usage
from spinetta.runtime.images.errands import TRANSIENT
from spinetta.runtime.images.store import ImageStore, PreparedImage
from spinetta.runtime.lookup import NotInImage, directory_missing, kind_of, program_missing
from spinetta.runtime.netattempts import Joined, NoNetwork
from spinetta.runtime.network import Network
from spinetta.runtime.protocol import AttemptKey, ContainerLaunch, Exited, Held, Launch, ShimLost, ShimRuntime
from spinetta.trust.backoff import Backoff

TASK_USER = (1000, 1000)  # who a command is when neither the task nor the image says, or the image says root
IMAGE_TRIES = 5  # for what may pass: a registry that is started again, a disk that is being emptied
IMAGE_AGAIN_FIRST_S, IMAGE_AGAIN_MOST_S = 2.0, 30.0
NO_SPACE = "no-space"
LISTINGS = 2  # without it in a row, before an attempt whose start had no answer is taken for gone
SECRETS_VARIABLE = "SPINETTA_SECRETS"
HOST_HOSTS, HOST_RESOLV = "/etc/hosts", "/etc/resolv.conf"


@dataclass(frozen=True, slots=True)
class Site:
    """What this node's machine and its administrator give containers.

    Attributes:
        program: absolute path of runc or crun.
        init: absolute path of the static init that is process 1 of each.
        host: what the machine can do.
        rules: what is insisted on with that program.
        uids, gids: which ids of the host are those of containers.
        overlay: root file systems can be laid over each other.
        allows: words of `container.check_allowance`, and what runs here.
        devices: files of the node by countable, as the setting names them.
        tmp_bytes: size of /tmp.
        hostname: inside; hosts_path: a file for /etc/hosts that knows it, for those without the host's network.
        task_user: see `TASK_USER`.
    """

    program: str
    init: str
    host: ocirequest.Host
    rules: ocirequest.Hardening
    uids: tuple[ocirequest.IdRange, ...]
    gids: tuple[ocirequest.IdRange, ...]
    overlay: bool
    allows: frozenset[str]
    devices: Mapping[str, tuple[str, ...]]
    tmp_bytes: int
    hostname: str
    hosts_path: str
    task_user: tuple[int, int] = TASK_USER

    @property
    def may_be_root(self) -> bool:
        """Whether a command may be user 0 of its container."""
        return self.task_user[0] == 0 or (self.rules.root_inside and ROOT in self.allows)


class Unfit(Exception):
    """This node cannot start it, another might: `reason` says so to the agent, `lacks` what else it could start."""

    def __init__(self, reason: Reason, message: str, lacks: str = "") -> None:
        super().__init__(message)
        self.reason = reason
        self.lacks = lacks


class RuncRuntime:
    """Runs attempts in containers, and as plain processes when they want none; implements `protocol.Runtime`.

    All that runs is held by the shim; this prepares. An image is in use from `prepare` to `forget`.
    """

    def __init__(self, shim: ShimRuntime, images: ImageStore, site: Site, network: Network | None = None) -> None:
        self._shim = shim
        self._images = images
        self._site = site
        self._network = network
        self._unanswered: dict[AttemptKey, int] = {}  # starts, and how many listings since had none of it

    def capabilities(self) -> tuple[str, ...]:
        """Names of what is enforced here."""
        return (*self._shim.capabilities(), CONTAINER)

    async def prepare(self, launch: Launch) -> Launch | Exit:
        """Bring in the image and make the configuration; see `protocol.Runtime.prepare`."""
        if launch.wants is None:
            return launch
        try:
            return await self._contain(launch, launch.wants)
        except Unfit as e:
            return _never(e.reason, str(e), e.lacks)
        except NoNetwork as e:
            return _never(Reason.NODE_UNFIT, str(e), network_need(launch.wants.network))
        except UserError as e:
            return _never(Reason.SPAWN_FAILED, str(e))
        except OSError as e:
            return _never(Reason.NODE_UNFIT, f"the container cannot be prepared: {e.strerror or e}")

    async def start(self, launch: Launch) -> Exit | None:
        """Start an attempt that was prepared; see `protocol.Runtime.start`."""
        self._unanswered.pop(launch.key, None)
        try:
            return await self._shim.start(launch)
        except (RuntimeUnavailable, asyncio.CancelledError):
            self._unanswered[launch.key] = 0
            raise

    async def stop(self, key: AttemptKey, why: str) -> None:
        """Ask for the end of an attempt; see `protocol.Runtime.stop`."""
        await self._shim.stop(key, why)

    async def renew(self, renewed_at_s: float) -> None:
        """Tell of a committed renewal; see `protocol.Runtime.renew`."""
        await self._shim.renew(renewed_at_s)

    async def forget(self, key: AttemptKey) -> None:
        """Remove all but the logs of an ended attempt; its image may go, and its network does."""
        await self._shim.forget(key)
        self._release(key)

    def _release(self, key: AttemptKey) -> None:
        self._unanswered.pop(key, None)
        self._images.release(key)
        if self._network is not None:
            self._network.release(key)

    async def held(self) -> Sequence[Held]:
        """All attempts that run or have ended and are not forgotten, by key."""
        judged = tuple(self._unanswered)  # before this listing began
        found = await self._shim.held()
        there = {held.key for held in found}
        for key in judged:
            if key in there:
                self._unanswered.pop(key, None)
            elif key in self._unanswered:
                self._unanswered[key] += 1
                if self._unanswered[key] >= LISTINGS:  # nobody will ask to forget what never was
                    self._release(key)
        return found

    async def usage(self, key: AttemptKey) -> Usage | None:
        """Use so far of a running attempt; None when it is over or nothing here counts it."""
        return await self._shim.usage(key)

    def events(self) -> AsyncIterator[Exited | ShimLost]:
        """Ends of attempts as they happen, beginning with those not forgotten yet."""
        return self._shim.events()

    def log_path(self, key: AttemptKey, stream: str) -> Path:
        """Where ``stdout`` or ``stderr`` of an attempt is, or would be."""
        return self._shim.log_path(key, stream)

    # --- from what is asked for to a configuration ---

    async def _contain(self, launch: Launch, asked: ContainerSpec) -> Launch:
        if refused := refusals(needs(asked), self._site.allows):
            raise Unfit(Reason.NODE_UNFIT, f"this node does not allow {', '.join(refused)}")
        mounts: tuple[Mount, ...] = ()
        if asked.mounts:  # a thread's turn costs half a millisecond
            mounts = await asyncio.to_thread(resolve_mounts, asked.mounts, self._site.allows)
        image = await self._image(imageref.parse(asked.image), launch.key)
        if asked.network != "bridge":
            return await asyncio.to_thread(self._configure, launch, asked, mounts, image)
        if self._network is None:
            raise NoNetwork("this node has no network for containers")
        async with self._network.joining(launch.key) as joined:  # until `forget`
            return await asyncio.to_thread(self._configure, launch, asked, mounts, image, joined)

    async def _image(self, ref: imageref.ImageRef, key: AttemptKey) -> PreparedImage:
        again = Backoff(IMAGE_AGAIN_FIRST_S, IMAGE_AGAIN_MOST_S)
        while True:
            try:
                return await self._images.acquire(ref, key, allows=self._site.allows)
            except (UserError, RuntimeUnavailable) as e:
                reason = e.reason if isinstance(e, UserError) else ""
                if isinstance(e, UserError) and reason not in TRANSIENT:
                    raise
                if again.tries + 1 >= IMAGE_TRIES:
                    if reason == NO_SPACE or isinstance(e, RuntimeUnavailable):
                        raise Unfit(Reason.NODE_UNFIT, str(e)) from e
                    raise
            await again.pause()

    def _configure(
        self,
        launch: Launch,
        asked: ContainerSpec,
        mounts: tuple[Mount, ...],
        image: PreparedImage,
        joined: Joined | None = None,
    ) -> Launch:
        site, state = self._site, self._shim.state_dir
        root_inside = site.may_be_root
        if not asked.user and image.user_trouble:
            raise UserError(
                f"the user of the image {asked.image}: {image.user_trouble}", hint="name another with --user"
            )
        uid, gid = ocirequest.user_of(asked.user, image.user, site.task_user, root_inside=root_inside)
        env = environment(image.env, launch)
        cwd, targets = launch.working_directory or ocirequest.SCRATCH, [m.target for m in mounts]
        if missing := directory_missing(image.rootfs, cwd, targets):
            raise UserError(f"{_told(missing, launch)} in the image {asked.image}")
        missing = program_missing(image.rootfs, launch.argv[0], env["PATH"], targets)
        if missing and not asked.writable:
            raise UserError(f"{_told(missing, launch)} in the image {asked.image}")
        lower = [str(image.rootfs)]
        if (skeleton := self._skeleton(image.rootfs, mounts)) is not None:
            lower.insert(0, str(skeleton))
        if (len(lower) > 1 or asked.writable) and not site.overlay:
            raise Unfit(
                Reason.NODE_UNFIT, "this node cannot lay file systems over each other, which this container needs"
            )
        hosts_path, resolv_path = site.hosts_path, ""
        if asked.network == "host":
            hosts_path, resolv_path = _if_there(HOST_HOSTS), _if_there(HOST_RESOLV)
        elif joined is not None:
            hosts_path, resolv_path = joined.hosts_path, joined.resolv_path
        request = ocirequest.Request(
            command=tuple(launch.argv),
            env=env,
            uid=uid,
            gid=gid,
            groups=image.groups if (uid, gid) == image.user else (),
            uids=site.uids,
            gids=site.gids,
            cwd=cwd,
            init_path=site.init,
            scratch_path=str(state / "scratch" / launch.key),
            secrets_path=str(state / "bundle" / "secrets") if launch.secrets else "",
            hostname=site.hostname,
            network=asked.network,
            netns_path=joined.netns_path if joined else "",
            sys_path=joined.sys_path if joined else "",
            hosts_path=hosts_path,
            resolv_path=resolv_path,
            writable=asked.writable,
            capabilities=asked.capabilities,
            mounts=mounts,
            devices=devices_of(launch.countables, site.devices, launch.units),
            tmp_bytes=asked.tmp_bytes or site.tmp_bytes,
            open_files=launch.open_files,
            programs_32=image.architecture in ocirequest.MACHINES_32,
            host=site.host,
            rules=replace(site.rules, root_inside=root_inside),
        )
        if problems := ocirequest.refusals(request):  # by what the image says: the rest was looked at when it came in
            words = "(sealed)" if launch.private else "; ".join(problems)
            raise UserError(f"no container can be made of the image {asked.image}: {words}")
        config = ociconfig.runtime_config(request)
        owner = (ocirequest.outside(site.uids, uid), ocirequest.outside(site.gids, gid))
        sources = tuple(mount.source for mount in mounts)
        contained = ContainerLaunch(site.program, config, tuple(lower), asked.writable, owner, sources)
        return replace(launch, container=contained)

    def _skeleton(self, rootfs: Path, mounts: Sequence[Mount]) -> Path | None:
        """A folder with the mount points that the image lacks; None when it lacks none. Made once, kept for ever."""
        lacking: list[tuple[str, bool]] = []
        for mount in mounts:
            is_folder = Path(mount.source).is_dir()
            try:
                there = kind_of(rootfs, mount.target)
            except NotInImage:
                lacking.append((mount.target, is_folder))
                continue
            wanted = "folder" if is_folder else "file"
            if there != wanted:
                raise UserError(f"{mount.target} is a {there} in the image, {mount.source} of this node is a {wanted}")
        if not lacking:
            return None
        name = hashlib.sha256(repr((sorted(lacking), self._site.uids)).encode()).hexdigest()[:32]
        folder = self._shim.state_dir / "skeletons" / name
        if not folder.is_dir():
            _make_skeleton(
                folder, lacking, ocirequest.outside(self._site.uids, 0), ocirequest.outside(self._site.gids, 0)
            )
        return folder


# --- parts ---------------------------------------------------------------------------------------------------------


def environment(of_image: Sequence[str], launch: Launch) -> dict[str, str]:
    """What the command sees: the usual, then what its image says, then what the task says."""
    usual = {"PATH": ociconfig.PATH_DEFAULT, "LANG": "C.UTF-8", "HOME": ocirequest.SCRATCH}
    pairs = (line.partition("=") for line in of_image)
    secrets = {SECRETS_VARIABLE: ocirequest.SECRETS} if launch.secrets else {}
    return {**usual, **{name: value for name, _, value in pairs if name}, **launch.env, **secrets}


def resolve_mounts(mounts: Sequence[Mount], allows: Collection[str]) -> tuple[Mount, ...]:
    """With the links in their sources followed, and what they lead to allowed as well.

    Raises:
        UserError: it is not there, or leads out of what is allowed.
    """
    found = []
    for mount in mounts:
        try:
            source = os.path.realpath(mount.source, strict=True)
        except OSError as error:
            raise UserError(f"cannot mount {mount.source} of this node: {error.strerror}") from None
        there = replace(mount, source=source)
        if source != mount.source and not is_granted(mount_need(there), allows):
            raise UserError(f"{mount.source} leads to {source}, which this node does not allow")
        found.append(there)
    return tuple(found)


def devices_of(
    countables: Sequence[tuple[str, int]], devices: Mapping[str, tuple[str, ...]], units: device_units.Labels = ()
) -> tuple[ocirequest.Device, ...]:
    """The device files that go with what was granted: of these units alone, where there are units.

    Raises:
        Unfit: one is not there.
    """
    found = []
    given = dict(units)
    for name, count in countables:
        of, labels = device_units.of_items(devices.get(name, ())), given.get(name, ())
        if of.units and len(labels) != count:
            was = f"it was given {', '.join(labels) or 'none'}"
            raise Unfit(Reason.NODE_UNFIT, f"{count} of {name} wanted, and {was}", name)
        for path in of.files(labels) if count else ():
            try:
                seen = Path(path).stat()
            except OSError as error:
                raise Unfit(Reason.NODE_UNFIT, f"the device {path} of {name}: {error.strerror}", name) from None
            if not stat.S_ISCHR(seen.st_mode) and not stat.S_ISBLK(seen.st_mode):
                raise Unfit(Reason.NODE_UNFIT, f"{path}, given as a device of {name}, is none", name)
            kind = "c" if stat.S_ISCHR(seen.st_mode) else "b"
            found.append(ocirequest.Device(path, kind, os.major(seen.st_rdev), os.minor(seen.st_rdev)))
    return tuple(found)


def _make_skeleton(folder: Path, lacking: Sequence[tuple[str, bool]], uid: int, gid: int) -> None:
    """All or nothing, however many want it at once. OSError: the disk will not have it."""
    folder.parent.mkdir(mode=0o711, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=".new-", dir=folder.parent))
    try:
        for target, is_folder in lacking:
            path = new / target.lstrip("/")
            (path if is_folder else path.parent).mkdir(parents=True, exist_ok=True)
            if not is_folder:
                path.touch()
        for top, folders, files in os.walk(new):
            for name in (".", *folders, *files):
                path = Path(top, name)
                os.chown(path, uid, gid)
                path.chmod(0o755 if path.is_dir() else 0o644)
        new.rename(folder)
    except OSError:
        shutil.rmtree(new, ignore_errors=True)
        if not folder.is_dir():  # else somebody else was faster
            raise


def _told(words: str, launch: Launch) -> str:
    """Without the command's own words after the colon, if nobody else may know them."""
    return f"{words.partition(':')[0]}: (sealed)" if launch.private else words


def _if_there(path: str) -> str:
    found = os.path.realpath(path)
    return found if Path(found).is_file() else ""


def _never(reason: Reason, message: str, lacks: str = "") -> Exit:
    return Exit(reason, message=message, ended_ms=time.time_ns() // 1_000_000, lacks=lacks)
