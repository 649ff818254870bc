"""Bad input as data: what is given over the command line, the task file and the API, and the answer it must get."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

ID = "01890a5d-ac96-774b-bcce-b302099a8057"
OTHER_ID = "01890a5d-ac96-774b-bcce-b302099a8058"
BIG = "x" * (128 << 10)


@dataclass(frozen=True)
class Cli:
    """A command line; `message` must be part of what it says, `code` its exit code. `online`: needs a node."""

    argv: tuple[str, ...]
    message: str
    code: int = 2
    stdin: str = ""
    env: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    online: bool = False


@dataclass(frozen=True)
class File:
    """A task file; the answer begins with ``NAME, `` or ``NAME `` and holds `message`; `part` is the field."""

    text: str
    message: str
    part: str
    format_: str = "yaml"


@dataclass(frozen=True)
class Api:
    """A call with fields as in JSON; `status` is gRPC's, `part` the field of the detail."""

    method: str
    request: dict[str, Any]
    status: str
    part: str
    message: str
    reason: str = "invalid"


def submit(*argv: str) -> tuple[str, ...]:
    return ("submit", *argv, "--", "true")


CLI = [
    # usage
    Cli(("submt",), "there is no command 'submt'; did you mean 'submit'?"),
    Cli(("frobnicate",), "there is no command 'frobnicate'; known: audit, cancel, cluster, completion"),
    Cli(("cluster", "backup", "-"), "a backup does not go to standard output"),
    Cli(("submit", "--cpu", "2", "--", "true"), "No such option '--cpu'"),
    Cli(("submit",), "there is no command"),
    Cli(("submit", "--"), "there is no command"),
    Cli(("wait",), "Missing argument 'ID…'"),
    Cli(("cancel",), "no task is named"),
    Cli(("cancel", "--label", "a=b"), "a filter without --all (add --all"),
    Cli(("cancel", "--all", ID), "ids and --all are given"),
    Cli(("list", "--state", "lost"), "'lost' is not one of"),
    Cli(("list", "--limit", "-1"), "-1 is not in the range"),
    Cli(("list", "--mine", "--owner", "x"), "--mine and --owner are given"),
    Cli(("log", "--both", "--stderr", ID), "--stderr and --both are given"),
    Cli(("log", "--tail", "0", ID), "a tail of nothing"),
    Cli(("completion", "tcsh"), "'tcsh' is not one of"),
    # a task's options
    Cli(submit("--memory", "lots"), "memory: not a size: 'lots' (write a number with a unit"),
    Cli(submit("--memory", "-1"), "must not be negative: '-1'"),
    Cli(submit("--memory", "2Q"), "unknown unit 'Q' in size '2Q'"),
    Cli(submit("--memory", "2000PiB"), "too large: '2000PiB'"),
    Cli(submit("--memory", "1024TiB1"), "not a size"),
    Cli(submit("--disk", "1.5"), "not a whole number of bytes: '1.5'"),
    Cli(submit("--cpus", "0.0001"), "finer than a thousandth of a core"),
    Cli(submit("--cpus", "two"), "not a number of cores: 'two'"),
    Cli(submit("--time", "soon"), "time: not a duration: 'soon' (write 90s, 1h30m"),
    Cli(submit("--time", "30m1h"), "units out of order"),
    Cli(submit("--time", "2w1y"), "not a duration: '2w1y'"),
    Cli(submit("--time", "53w"), "is out of range for a walltime"),
    Cli(submit("--gpu", "many"), "'many' is not a valid integer"),
    Cli(submit("--gpu", "-1"), "-1 is out of range for a number of gpu"),
    Cli(submit("--gpu", "1", "--countable", "gpu=1"), "gpu is given twice"),
    Cli(submit("--countable", "gpu"), "not NAME=NUMBER: 'gpu'"),
    Cli(submit("--countable", "GPU=1"), "not a name for a countable: 'GPU'"),
    Cli(submit("--countable", "memory=1"), "'memory' is no countable"),
    Cli(submit("--tag", "a b"), "tags[0]: not a tag: 'a b'"),
    Cli(submit("--tag", "a", "--not-tag", "a"), "tag 'a' is both required and forbidden"),
    Cli(submit("--label", "run"), "not KEY=VALUE: 'run'"),
    Cli(submit("--label", "=7"), "not a label's key: ''"),
    Cli(submit("--label", "a=\x1b[2J"), "label 'a' holds the character U+001B"),
    Cli(submit("--name", "x" * 257), "the name has 257 characters"),
    Cli(submit("--env", "1A=x"), "not a name for an environment variable: '1A'"),
    Cli(submit("--env", "SURELY_NOT_SET_HERE"), "environment variable 'SURELY_NOT_SET_HERE' is not set here"),
    Cli(submit("--workdir", "here"), "workdir: not an absolute path: 'here'"),
    Cli(submit("--priority", "1001"), "1001 is out of range for a priority (-1000 to 1000)"),
    Cli(submit("--retries", "101"), "101 is out of range for a number of retries"),
    Cli(submit("--backoff", "2d"), "172800 s is out of range for a back-off"),
    Cli(submit("--grace", "1s"), "1 s is out of range for a grace (3 to 86400 seconds)"),
    Cli(submit("--owner", "a b"), "not an owner: 'a b'"),
    Cli(submit("--id", "7"), "not a task id: '7' (a UUID of version 7"),
    Cli(submit("--id", ID.upper()), "not a task id"),
    Cli(("submit", "--", ""), "the program's name is empty"),
    Cli(("submit", "--", "echo", "\udcff"), "argument 1 is not UTF-8"),
    Cli(("submit", "--", *["x"] * 4097), "the command has 4097 arguments"),
    Cli(submit("--format", "json"), "--format is for --file"),
    Cli(submit("--file", "tasks.yaml"), "a command and --file are given"),
    Cli(("submit", "--file", "no-such.yaml"), "there is no file no-such.yaml"),
    Cli(("submit", "--file", "-"), "the format of standard input is not known (--format yaml, json or jsonl)"),
    Cli(
        ("submit", "--file", "tasks.txt"), "the format of a file called tasks.txt is not known", files={"tasks.txt": ""}
    ),
    Cli(("submit", "--file", "-", "--format", "json", "--id", ID), "--id and --file are given", stdin="[]"),
    Cli(
        ("submit", "--follow", "--file", "-", "--format", "jsonl"),
        "--follow shows one task, not 2",
        code=125,
        stdin='{"command": "a"}\n{"command": "b"}\n',
    ),
    Cli(("submit", "--wait", "--memory", "lots", "--", "true"), "not a size", code=125),
    # which cluster
    Cli(
        ("list", "--node", "10.0.0.1:7220"),
        "you have no credentials for the cluster at '10.0.0.1:7220'",
        code=8,
    ),
    Cli(("list", "--node", "127.0.0.1"), "--node: not an address: '127.0.0.1' (write HOST:PORT"),
    Cli(("list", "--node", "127.0.0.1:99999"), "not a port: '99999'"),
    Cli(("list", "--timeout", "0"), "--timeout: 0s is out of range"),
    Cli(("list",), "SPINETTA_NODE: not an address: 'nowhere'", env={"SPINETTA_NODE": "nowhere"}),
    Cli(("list", "--config", "no-such.toml"), "there is no settings file no-such.toml"),
    Cli(("list", "--config", "a.toml"), "a.toml is not TOML", files={"a.toml": "= 1"}),
    Cli(
        ("list", "--config", "a.toml"),
        "a.toml: unknown setting 'nodes' in [client] (did you mean 'node'?)",
        files={"a.toml": "[client]\nnodes = []\n"},
    ),
    Cli(("list", "--node", "127.255.255.254:1", "--timeout", "200ms"), "no node answers at 127.255.255.254:1", code=4),
    # ids and filters, refused before anybody is asked
    Cli(("status", "xyz"), "ids[0]: not a task id: 'xyz'"),
    Cli(("status", "018"), "too short for a task id: '018'"),
    Cli(("log", "../../etc/passwd"), "not a task id: '../../etc/passwd'"),
    Cli(("cancel", ID, "nope!"), "ids[1]: not a task id: 'nope!'"),
    Cli(("wait", ID, "--timeout", "never"), "not a duration: 'never'"),
    Cli(("list", "--label", "a b=c"), "not a label's key: 'a b'"),
    Cli(("list", "--on", "Node_1"), "not a name for a node: 'Node_1'"),
    Cli(("node", "drain", "a/b"), "not a name for a node: 'a/b'"),
    Cli(("decode", "--type", "job"), "there is no type 'job' (task, queued"),
    Cli(("decode",), "what it is cannot be told", stdin="hello"),
    Cli(("decode",), "no record is stored under '/x/y'", stdin="/x/y\nhello"),
    # a node's settings
    Cli(("node", "join", "--name", "Big Box"), "--name: not a name for a node: 'Big Box'"),
    Cli(("node", "join", "--tls", "off", "--address", "192.168.1.2:7220"), "'192.168.1.2:7220' is off loopback"),
    Cli(("node", "join", "--tls", "off", "--peers", "10.1.1.1:7220"), "'10.1.1.1:7220' is off loopback"),
    Cli(("node", "join", "--address", "0.0.0.0:7220"), "address '0.0.0.0:7220' is of no machine"),
    Cli(
        ("node", "join", "--voters-wanted", "2"), "--voters-wanted: 2 voters: an even number survives no more failures"
    ),
    Cli(("node", "join", "--grace", "12s"), "grace of 12s (from --grace) is not longer than lease_ttl 10s"),
    Cli(("node", "join", "--tags", "a b"), "--tags: not a tag: 'a b'"),
    Cli(("node", "join"), "SPINETTA_MEMORY: not a size: 'much'", env={"SPINETTA_MEMORY": "much"}),
    Cli(
        ("node", "join", "--config", "n.toml"),
        "n.toml, [node] cpus: a number of cores must not be negative",
        files={"n.toml": "[node]\ncpus = -1\n"},
    ),
    Cli(
        ("node", "join", "--etcd-peer-port", "7220"),
        "etcd_peer_port 7220 (from --etcd-peer-port) is also the port of address",
    ),
    Cli(("node", "stop", "--data-dir", "no/such"), "there is no data directory"),
    Cli(("node", "leave", "--wait", "x"), "wait: not a duration: 'x'"),
    # what only a cluster can tell
    Cli(("status", ID), f"there is no task {ID}", code=3, online=True),
    Cli(("log", ID), f"there is no task {ID}", code=3, online=True),
    Cli(("log", "-f", ID), f"there is no task {ID}", code=3, online=True),
    Cli(("cancel", ID), f"there is no task {ID}", code=3, online=True),
    Cli(("wait", ID), f"there is no task {ID}", code=3, online=True),
    Cli(("status", "ffff"), "there is no task ffff", code=3, online=True),
    Cli(("node", "show", "nobody"), "there is no node nobody", code=3, online=True),
    Cli(("node", "drain", "nobody"), "there is no node nobody", code=3, online=True),
    Cli(("node", "leave", "nobody"), "there is no node nobody", code=3, online=True),
    Cli(("decode", "/task/nothing"), "there is no key '/task/nothing'", code=3, online=True),
]

FILES = [
    File("", "there are no tasks", "file"),
    File("command: [a]", "must be a list of tasks (begin each task with '- command: …')", "file"),
    File("- command: [a\n", "not YAML: ", "file"),
    File("- just text", "entry 1 (line 1): an entry must be a table of settings, not text", "tasks[0]"),
    File("-\n", "entry 1 (line 1): an entry must be a table of settings, not nothing", "tasks[0]"),
    File("- name: a", "entry 1 (line 1): there is no command", "tasks[0].command"),
    File(
        "- command: a\n- command: b\n  memroy: 1G",
        "entry 2 (line 2): unknown key 'memroy' (did you mean 'memory'?)",
        "tasks[1].memroy",
    ),
    File("- command: a\n  7: b", "unknown key '7' (known: backoff, capabilities, clearance", "tasks[0].7"),
    File("- command: 7", "entry 1 (line 1): command must be text or a list of text, not a number", "tasks[0].command"),
    File(
        "- command: [a, 7]",
        "command must be text or a list of text, not a list with a number in it",
        "tasks[0].command",
    ),
    File("- command: []", "the command is empty", "tasks[0].command"),
    File(
        "- command: 'echo \"open'", "the command cannot be split into words: No closing quotation", "tasks[0].command"
    ),
    File("- command: a\n  name: 7", 'name must be text, not a number (write it in quotes: "7")', "tasks[0].name"),
    File("- command: a\n  env: [A]", "env must be a table of text, not a list", "tasks[0].env"),
    File(
        "- command: a\n  env: {A: 1}", "env: 'A' must be text, not a number (write it in quotes: \"1\")", "tasks[0].env"
    ),
    File("- command: a\n  env: {A: yes}", "env: 'A' must be text, not yes/no", "tasks[0].env"),
    File("- command: a\n  labels: {run: 7}", "labels: 'run' must be text, not a number", "tasks[0].labels"),
    File("- command: a\n  memory: [1]", "a size must be text or a number, not list", "tasks[0].memory"),
    File("- command: a\n  memory: true", "a size must be text or a number, not bool", "tasks[0].memory"),
    File("- command: a\n  memory: lots", "not a size: 'lots'", "tasks[0].memory"),
    File("- command: a\n  cpus: -1", "must not be negative: '-1'", "tasks[0].cpus"),
    File("- command: a\n  time: .nan", "not a duration: 'nan'", "tasks[0].time"),
    File("- command: a\n  gpu: 1.5", "gpu must be a whole number, not a number", "tasks[0].gpu"),
    File("- command: a\n  countables: gpu=1", "countables must be a table, not text", "tasks[0].countables"),
    File("- command: a\n  countables: {gpu: -1}", "-1 is out of range", "tasks[0].countables"),
    File("- command: a\n  tags: [1]", "tags must be a list of text, not a list with a number in it", "tasks[0].tags"),
    File(
        "- command: a\n  tags: [ssd]\n  not_tags: [ssd]",
        "tag 'ssd' is both required and forbidden",
        "tasks[0].not_tags",
    ),
    File("- command: a\n  restart: maybe", "restart must be yes or no, not text", "tasks[0].restart"),
    File("- command: a\n  priority: 5000", "5000 is out of range for a priority", "tasks[0].priority"),
    File("- command: a\n  workdir: ./x", "not an absolute path: './x'", "tasks[0].workdir"),
    File("- command: a\n  name: a\n  name: b", "key 'name' is given twice (line 3)", "file"),
    File(f"- command: a\n  id: {ID}\n- command: b\n  id: {ID}", "entry 2: the id of entry 1 again", "tasks[1].id"),
    File("- command: a\n  id: 3f06af63-a93c-41e8-9b2d-6f0f4a4f8c11", "not a task id", "tasks[0].id"),
    File("- !!python/object/apply:os.system [true]", "not YAML: could not determine a constructor", "file"),
    File("- command: a\n  when: 2024-01-01", "unknown key 'when'", "tasks[0].when"),
    File("{", "not JSON: ", "file", "json"),
    File('{"command": "a"}', "must be a list of tasks ([{…}, {…}]; for lines use --format jsonl)", "file", "json"),
    File('[{"command": "a", "command": "b"}]', "not JSON: key 'command' is given twice", "file", "json"),
    File("[null]", "entry 1: an entry must be a table of settings, not nothing", "tasks[0]", "json"),
    File("[" * 100_000, "not JSON: ", "file", "json"),
    File('{"command": "a"}\n\n{"command": }', "line 3: not JSON: Expecting value", "file", "jsonl"),
    File(
        '{"command": "a"}\n{"cmd": "b"}',
        "entry 2 (line 2): unknown key 'cmd' (did you mean 'command'?)",
        "tasks[1].cmd",
        "jsonl",
    ),
    File('{"command": ["a", "\\u0000"]}', "argument 1 holds a NUL character", "tasks[0].command[1]", "jsonl"),
]


def task(**change: Any) -> dict[str, Any]:
    return {"tasks": [{"id": ID, "command": ["true"], **change}]}


def bad_task(change: dict[str, Any], part: str, message: str, reason: str = "invalid") -> Api:
    return Api("Submit", task(**change), "INVALID_ARGUMENT", f"tasks[0].{part}", message, reason)


API = [
    Api("Submit", {}, "INVALID_ARGUMENT", "tasks", "no task is given"),
    Api("Submit", {"tasks": [{"id": ID, "command": ["a"]}] * 2}, "INVALID_ARGUMENT", "tasks[1].id", "given again"),
    Api("Submit", {"tasks": [{"command": ["a"]}] * 1001}, "INVALID_ARGUMENT", "tasks", "1001 tasks", "too-large"),
    bad_task({"id": ""}, "id", "a task needs an id"),
    bad_task({"id": "x"}, "id", "not a task id: 'x'"),
    bad_task({"id": ID.upper()}, "id", "not a task id"),
    bad_task({"id": "3f06af63-a93c-41e8-9b2d-6f0f4a4f8c11"}, "id", "not a task id"),
    bad_task({"command": []}, "command", "the command is empty"),
    bad_task({"command": [""]}, "command[0]", "the program's name is empty"),
    bad_task({"command": ["a", "\0"]}, "command[1]", "argument 1 holds a NUL character"),
    bad_task({"command": ["a", BIG]}, "command[1]", "argument 1 has 131072 bytes", "too-large"),
    bad_task({"command": ["a"] * 5000}, "command", "the command has 5000 arguments", "too-large"),
    bad_task({"command": ["a", *["x" * 90_000] * 3]}, "command", "270005 bytes together", "too-large"),
    bad_task({"env": {"A=B": ""}}, "env", "not a name for an environment variable: 'A=B'"),
    bad_task({"env": {"A": "\0"}}, "env", "environment variable 'A' holds a NUL"),
    bad_task({"env": {f"A{i}": "" for i in range(1025)}}, "env", "1025 environment variables", "too-large"),
    bad_task({"name": "x" * 257}, "name", "the name has 257 characters", "too-large"),
    bad_task({"name": "a\u009b"}, "name", "the name holds the character U+009B"),
    bad_task({"labels": {"": "x"}}, "labels", "not a label's key: ''"),
    bad_task({"labels": {f"k{i}": "" for i in range(65)}}, "labels", "65 labels", "too-large"),
    bad_task({"owner": "a b"}, "owner", "not an owner: 'a b'"),
    bad_task({"working_directory": "x"}, "working_directory", "not an absolute path: 'x'"),
    bad_task({"resources": {"cpu_millis": 2**63}}, "resources.cpu_millis", "is out of range"),
    bad_task(
        {"resources": {"memory_bytes": 2**60}}, "resources.memory_bytes", "is out of range for an amount of memory"
    ),
    bad_task({"resources": {"disk_bytes": 2**61}}, "resources.disk_bytes", "is out of range for an amount of disk"),
    bad_task({"resources": {"countables": {"A": 1}}}, "resources.countables", "not a name for a countable: 'A'"),
    bad_task({"walltime_s": -1.0}, "walltime_s", "-1 s is out of range for a walltime"),
    bad_task({"walltime_s": "NaN"}, "walltime_s", "nan s is out of range"),
    bad_task({"walltime_s": "Infinity"}, "walltime_s", "inf s is out of range"),
    bad_task({"tags_required": ["a b"]}, "tags_required[0]", "not a tag: 'a b'"),
    bad_task({"tags_required": ["a"], "tags_forbidden": ["a"]}, "tags_forbidden", "both required and forbidden"),
    bad_task({"tags_forbidden": [f"t{i}" for i in range(33)]}, "tags_forbidden", "33 tags", "too-large"),
    bad_task({"priority": -1001}, "priority", "-1001 is out of range for a priority"),
    bad_task({"retries": 2**31}, "retries", "is out of range for a number of retries"),
    bad_task({"retry_backoff_s": 1e9}, "retry_backoff_s", "is out of range for a back-off"),
    bad_task({"grace_s": 0.5}, "grace_s", "0.5 s is out of range for a grace"),
    Api("Get", {}, "INVALID_ARGUMENT", "ids", "no task is named"),
    Api("Get", {"ids": [ID] * 1001}, "INVALID_ARGUMENT", "ids", "1001 ids", "too-large"),
    Api("Get", {"ids": [OTHER_ID, "%%"]}, "INVALID_ARGUMENT", "ids[1]", "not a task id: '%%'"),
    Api("Get", {"ids": ["/task/"]}, "INVALID_ARGUMENT", "ids[0]", "not a task id: '/task/'"),
    Api("Get", {"ids": [ID]}, "NOT_FOUND", "ids[0]", f"there is no task {ID}", "not-found"),
    Api("Get", {"ids": ["0123456789"]}, "NOT_FOUND", "ids[0]", "there is no task 0123456789", "not-found"),
    Api("Cancel", {}, "INVALID_ARGUMENT", "ids", "no task is named"),
    Api("Cancel", {"ids": [ID]}, "NOT_FOUND", "ids[0]", f"there is no task {ID}", "not-found"),
    Api(
        "Cancel", {"ids": [ID], "reason": "\x07"}, "INVALID_ARGUMENT", "reason", "the reason holds the character U+0007"
    ),
    Api("Cancel", {"ids": [ID], "reason": "x" * 1025}, "INVALID_ARGUMENT", "reason", "1025 characters", "too-large"),
    Api("Wait", {}, "INVALID_ARGUMENT", "ids", "no task is named"),
    Api("Wait", {"ids": [ID], "timeout_s": -1.0}, "INVALID_ARGUMENT", "timeout_s", "out of range for a time to wait"),
    Api("Wait", {"ids": [ID], "timeout_s": 1.0}, "NOT_FOUND", "ids[0]", f"there is no task {ID}", "not-found"),
    Api("List", {"page_size": 1001}, "INVALID_ARGUMENT", "page_size", "1001 is out of range for a page size"),
    Api("List", {"page_token": "x"}, "INVALID_ARGUMENT", "page_token", "not a page token"),
    Api("List", {"filter": {"states": [77]}}, "INVALID_ARGUMENT", "filter.states[0]", "there is no state 77"),
    Api("Watch", {"from_revision": -1}, "INVALID_ARGUMENT", "from_revision", "a revision is not negative"),
    Api("Watch", {"ids": ["x"]}, "INVALID_ARGUMENT", "ids[0]", "not a task id: 'x'"),
    Api("Log", {}, "INVALID_ARGUMENT", "id", "not a task id: ''"),
    Api("Log", {"id": ID}, "NOT_FOUND", "id", f"there is no task {ID}", "not-found"),
    Api("Log", {"id": ID, "stream": 9}, "INVALID_ARGUMENT", "stream", "there is no stream 9"),
    Api("Log", {"id": ID, "tail_bytes": -1}, "INVALID_ARGUMENT", "tail_bytes", "a length is not negative"),
    Api("Log", {"id": ID, "tail_bytes": 1, "offset": 1}, "INVALID_ARGUMENT", "tail_bytes", "exclude each other"),
    Api("Drain", {"node": "A"}, "INVALID_ARGUMENT", "node", "not a name for a node: 'A'"),
    Api("Drain", {"node": "nobody"}, "NOT_FOUND", "node", "there is no node nobody", "not-found"),
    Api("Undrain", {"node": "nobody"}, "NOT_FOUND", "node", "there is no node nobody", "not-found"),
    Api("ConfirmDead", {"node": "A"}, "INVALID_ARGUMENT", "node", "not a name for a node: 'A'"),
    Api("ConfirmDead", {"node": "nobody"}, "NOT_FOUND", "node", "no node nobody is lost", "not-found"),
    Api("Leave", {"node": "nobody"}, "NOT_FOUND", "node", "there is no node nobody", "not-found"),
]
