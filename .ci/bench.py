"""Measure mydocker beside other runtimes, each with the same limits and a busybox rootfs; as root.

    python3 .ci/bench.py [ROUNDS]

Only ratios of one run say something: the commands take turns, so that all have the same machine.
runc is the measure and has to be there (apt-get install runc); podman takes part if it is there, and so
does runc with Docker's seccomp profile, which is in Debian's golang-github-containers-common.
"""

import json
import os
import py_compile
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
PROFILE = Path("/usr/share/containers/seccomp.json")
MEMORY, PIDS, WAITING, AT_ONCE, BATCH = 100 << 20, 500, 50, 8, 80
FLAGS = ["-m", f"{MEMORY}", "--cpuset-cpus", "0", "--pids-limit", f"{PIDS}"]
PYTHON = "/usr/bin/python3"
ID, NAME = "(the id)", f"mydocker-bench-{os.getpid()}-"


def dockers_filter(capabilities):
    """Docker's profile in the form that runc takes, as for a container with these capabilities."""
    profile, rules = json.loads(PROFILE.read_text()), []
    for rule in profile["syscalls"]:
        only, never = rule.get("includes") or {}, rule.get("excludes") or {}
        wanted = set(only.get("caps") or ()) <= capabilities and "amd64" in (only.get("arches") or ["amd64"])
        if wanted and not capabilities & set(never.get("caps") or ()):
            keys = ("names", "action", "args", "errnoRet")
            rules.append({key: rule[key] for key in keys if rule.get(key)})
    return {
        "defaultAction": profile["defaultAction"],
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": rules,
    }


def runc_bundle(directory, rootfs, command, seccomp):
    """Write a config.json with what mydocker does: its limits, its capabilities."""
    directory.mkdir()
    subprocess.run(["runc", "spec"], cwd=directory, check=True)
    config = json.loads((directory / "config.json").read_text())
    sys.path.insert(0, str(HERE))
    sys.dont_write_bytecode = True
    import mydocker

    names = ["CAP_" + name for name in mydocker.DEFAULT_CAPABILITIES]
    config["root"] = {"path": str(rootfs), "readonly": False}
    config["process"].update(terminal=False, args=command, noNewPrivileges=True)
    config["process"]["capabilities"] = dict.fromkeys(("bounding", "effective", "permitted"), names)
    limits = {"memory": {"limit": MEMORY}, "cpu": {"cpus": "0"}, "pids": {"limit": PIDS}}
    config["linux"]["resources"] = limits
    if seccomp:
        config["linux"]["seccomp"] = dockers_filter(set(names))
    (directory / "config.json").write_text(json.dumps(config))
    return ["runc", "run", "--bundle", str(directory), ID]


def engines(work, rootfs, command):
    """The command lines, by name, but for the container's id where one has to be given."""
    compiled = py_compile.compile(str(HERE / "mydocker.py"), str(work / "mydocker.pyc"), doraise=True)
    what = os.path.basename(command[0])
    found = {"runc, no seccomp": runc_bundle(work / f"plain-{what}", rootfs, command, False)}
    for name, how in (
        ("python3 mydocker.py", [str(HERE / "mydocker.py")]),
        ("python3 -m mydocker", ["-m", "mydocker"]),  # in its directory; keeps the bytecode in __pycache__
        ("python3 mydocker.pyc", [compiled]),
    ):
        found[name] = [PYTHON, *how, "run", *FLAGS, "--rootfs", str(rootfs), *command]
    if PROFILE.exists():
        found["runc, Docker's profile"] = runc_bundle(work / f"docker-{what}", rootfs, command, True)
    if shutil.which("podman"):
        podman = ["podman", "--runtime", "runc", "--cgroup-manager", "cgroupfs", "--events-backend", "none"]
        options = ["--rm", "--network", "none", "--ulimit", "nofile=1024:1024", "--ulimit", "nproc=4096:4096"]
        found["podman"] = [*podman, "run", "--name", ID, *options, *FLAGS, "--rootfs", str(rootfs), *command]
    return found


def start(command, **how):
    """Start one container."""
    name = f"{NAME}{random.getrandbits(64):x}"
    command = [name if word == ID else word for word in command]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, **how)


def seconds(command):
    """From start to exit."""
    begin = time.monotonic()
    if start(command).wait():
        sys.exit(f"failed: {' '.join(command)}")
    return time.monotonic() - begin


def per_second(command):
    """Containers a second, AT_ONCE at a time."""
    begin, running, left = time.monotonic(), [], BATCH
    while left or running:
        while left and len(running) < AT_ONCE:
            running.append(start(command))
            left -= 1
        if running.pop(0).wait():
            sys.exit(f"failed: {' '.join(command)}")
    return BATCH / (time.monotonic() - begin)


def mebibytes(command):
    """Proportional memory (PSS) of all that stays on the host for a container, with WAITING of them."""
    waiting = [start([*command], stdout=subprocess.PIPE) for _ in range(WAITING)]
    for process in waiting:
        if not process.stdout.readline():  # when it has a line, it is up
            sys.exit(f"failed: {' '.join(command)}")
    parents = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            pass  # it has ended
    conmons = f"pgrep -f conmon.*{NAME}" if shutil.which("conmon") else "true"
    hosts = {process.pid for process in waiting}
    hosts |= set(map(int, subprocess.run(conmons.split(), stdout=subprocess.PIPE).stdout.split()))
    total = 0
    for pid in hosts:
        total += int(Path(f"/proc/{pid}/smaps_rollup").read_text().split("\nPss:")[1].split()[0])
    for pid, parent in parents.items():
        if parent in hosts and pid not in hosts:
            os.kill(pid, signal.SIGKILL)  # the command
    for process in waiting:
        process.communicate()
    return total / 1024 / WAITING


def main(rounds):
    """Print the table."""
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        rootfs = work / "rootfs"
        shutil.copy(HERE / "mydocker.py", work)
        os.chdir(name)
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        subprocess.run([HERE / "busybox-rootfs.sh", rootfs], check=True, stdout=subprocess.DEVNULL)
        commands = engines(work, rootfs, ["/bin/true"])
        waiting = engines(work, rootfs, ["/bin/sh", "-c", "echo up; exec sleep 1000"])
        times = {name: [] for name in commands}
        for command in commands.values():
            seconds(command)  # once, for the caches
        for _ in range(rounds):
            for name in random.sample(list(commands), len(commands)):
                time.sleep(0.05)
                times[name].append(seconds(commands[name]))
        base = list(commands)[0]
        version = subprocess.run([PYTHON, "-V"], check=True, stdout=subprocess.PIPE).stdout.decode().strip()
        print(f"Linux {os.uname().release}, {os.cpu_count()} CPUs, {version}, {rounds} rounds\n")
        print(f"| command | ms | to runc | a second, {AT_ONCE} at a time | MiB, {WAITING} waiting |")
        print("|---|--:|--:|--:|--:|")
        for name in sorted(times, key=lambda name: statistics.median(times[name])):
            median = statistics.median(times[name]) * 1000
            ratio = statistics.median(a / b for a, b in zip(times[name], times[base]))
            rate, size = per_second(commands[name]), mebibytes(waiting[name])
            print(f"| {name} | {median:.1f} | {ratio:.2f} | {rate:.0f} | {size:.1f} |")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 40)
