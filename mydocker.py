#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""mydocker: a Linux container runtime in one file.

    sudo python3 mydocker.py run -ti -m 100m /bin/sh

A container is an ordinary process to which the kernel shows a world of its own: namespaces decide what
it sees, a root filesystem what it has, cgroups what it may use, capabilities and seccomp what it may
ask for. Two functions build one, joined by two pipes:

    run()  outside                              init()  inside: PID 1, and then the command
    --------------------------------------      ----------------------------------------------
    parse(), prepare(): refuse what cannot work
    make_cgroups(): limits, read back
    (without root: a user namespace)
    unshare(CLONE_NEWPID), fork --------------> die with the parent
    supervise(): signals, terminal              unshare: mount, uts, ipc, net; every mount private
    |                                           Rootfs.enter(): clones, overlay, /dev, pivot_root
    | <------ "the terminal is there" --------- with -t
    send the command, close the pipe ---------> read the command until EOF
    |                                           Rootfs.furnish(): volumes
    |                                           join_cgroups(); unshare: cgroup namespace
    |                                           drop_privileges(): user, capabilities, seccomp
    | <------------ EOF of the other pipe ----- execve: the command is PID 1
    look at it, let it go, wait, report, remove the cgroups

The story comes first: run() and init() are tables of contents; what they call follows, a section for each
subject. Every call that changes something outside this process goes through call(), which is what
`run --explain` prints, all but the bytes it relays; flags are named as in section 2 of the manual.

Capabilities, system calls and masked paths are as in Docker; there is no AppArmor or SELinux profile.
The kernel is shared: whoever exploits a bug in it is out. It has to be Linux 5.12 or newer.
See namespaces(7), pivot_root(2), cgroups(7), capabilities(7), seccomp(2), pty(7); in the kernel's own
documentation, admin-guide/cgroup-v2.rst and filesystems/overlayfs.rst.
"""

import sys

if sys.platform != "linux" or sys.version_info < (3, 9) or sys.maxsize < 2**32:
    sys.stderr.write("mydocker: this needs a 64-bit Linux and Python 3.9 or newer\n")
    sys.exit(125)
# The directory of the script, or with -m the current one, may be anybody's: no module is taken from there.
# With -I or -P the first is the library as a zip archive, which nobody has
if __name__ == "__main__":
    del sys.path[0]

try:  # every run pays for each import: hence _signal, which is signal without enum (3 ms), no argparse (8)
    import os
    while (fd := os.open("/dev/null", os.O_RDWR)) < 3:  # first: ctypes' libffi opens a file and keeps it
        os.set_inheritable(fd, True)  # a closed one: the next file that we open would get its number
    os.close(fd)
    import _signal as signal
    import ctypes
    import errno
    import fcntl
    import math
    import select
    import stat
    import struct
    import termios
    import time
except (ImportError, OSError) as missing:  # OSError: from Python 3.14 on, too few descriptors for that
    sys.stderr.write(f"mydocker: {missing}: is Python whole (apt-get install python3), is /dev/null there?\n")
    sys.exit(125)

VERSION = "mydocker 1.0"
EXIT_MYDOCKER, EXIT_NOT_EXECUTABLE, EXIT_NOT_FOUND, EXIT_SIGNAL = 125, 126, 127, 128  # as docker run's

# ---- The story: run, init, main ------------------------------------------------------------------

def run(options, argv):
    """Run `argv` in a new container; return docker run's exit status. Raises Failure, OSError."""
    prepare(options)
    caller_mask, signal_fd = watch_signals()
    undo: "list" = []  # steps of the teardown; the last first, on every way out
    try:
        if options.upperdir:
            lock_upperdir(options)
        cgroups = make_cgroups(options, undo)
        stdio, ours = relay_terminals(options)
        if options.rootless:
            enter_user_namespace()  # first: it owns the namespaces made after it, so its root may mount there
        call("unshare", "CLONE_NEWPID", why="the next child is PID 1 of a new pid namespace")
        command_read, command_write = call("pipe2", "O_CLOEXEC", why="carries the command; its EOF says go")
        ready_read, ready_write = call("pipe2", "O_CLOEXEC", why="init says how far it is; execve closes it")
        # nothing is buffered here that the child would write again: all our output is by os.write
        pid = call("fork", why="the child goes on with the code that is here: no second interpreter")
        if pid == 0:
            # without its copies of run()'s ends: else the command has no EOF, and init is its own reader
            be_child((command_write, ready_read), init,
                     options, cgroups, command_read, ready_write, stdio, caller_mask)
        container = Container(options, pid, signal_fd)
        undo.append(container.end)
        for fd in (command_read, ready_write, *stdio.values()):  # or we never see EOF
            os.close(fd)
        if options.pidfile:
            write_pidfile(options.pidfile, pid, undo)
        for cgroup in cgroups:
            cgroup.hurry_join()
        wstatus = container.supervise(argv, command_write, ready_read, ours)
    finally:
        for step in reversed(undo):
            try:
                step()
            except OSError as error:  # no more than a warning: the status is the command's
                log.warning(error.strerror)
    status = os.waitstatus_to_exitcode(wstatus)
    return status if status >= 0 else EXIT_SIGNAL - status

def init(options, cgroups, command_read, ready_write, stdio, caller_mask):
    """Turn this process, just forked into a new pid namespace, into the container. It returns by raising."""
    log.side = "init"
    # first: whatever is done here is to end with run(), also when SIGKILL ends that at this moment
    call("prctl", "PR_SET_PDEATHSIG", "SIGKILL", why="die with the parent, whatever kills it")
    os.umask(0)  # what is made below says its mode itself
    call("setsid", why="a session of its own: /dev/tty is not the caller's terminal, Ctrl-C not for us")
    own_network = options.network == "none"
    call("unshare", "CLONE_NEWNS|CLONE_NEWUTS|CLONE_NEWIPC" + "|CLONE_NEWNET" * own_network,
         why=f"mounts, host name, System V IPC{', network' * own_network}: its own from here on")
    # systemd has made "/" shared: without this every mount below would show up on the host, and stay
    call("mount", None, "/", None, "MS_REC|MS_PRIVATE", None, why="no mount made here may reach the host")
    rootfs = Rootfs(options)
    rootfs.enter()
    place_cgroups(cgroups)
    call("sethostname", options.hostname, len(options.hostname), why="in the new uts namespace")
    if own_network:  # before mask(), which makes /proc/sys read-only
        set_up_network(options)
    rootfs.mask()
    if options.tty:
        call("write", ready_write, b"T", why="run() may open the pty, then send argv")
    argv = read_file(at(command_read), "wait until run() is ready and sends the command").split("\0")[:-1]
    if not argv:
        raise BrokenPipeError  # EOF at once: run() has died
    attach_stdio(options, stdio)  # before the volumes: null device and terminal are ours, whatever they cover
    rootfs.furnish()
    uid, gid, groups, home = find_user(options)
    enter_workdir(options)
    for fd in rootfs.to_freeze:  # now that mount points and workdir are there; what is mounted below stays
        set_attributes(fd, "MOUNT_ATTR_RDONLY", "--read-only")
    env = environment(options, home)
    places = find_command(argv[0], env.get("PATH", DEFAULT_PATH))
    join_cgroups(options, cgroups)  # late, but before the filter, which refuses unshare and mount, ...
    leave_behind(uid, ready_write, log.fd)  # ... and keyctl
    drop_privileges(options, uid, gid, groups)
    if poll({ready_write: select.POLLERR}, 0):
        raise BrokenPipeError  # no reader: run() died before PR_SET_PDEATHSIG was set again
    os.umask(0o022)
    execute(options, argv, places, env, caller_mask)

def main(words):
    """Be the program; return its exit status."""
    try:
        command, *rest = words or [""]
        if not ARCHITECTURE:
            raise Failure("the system calls of this machine are not known here: see uname -m")
        if command == "run":
            options = Options()
            try:
                argv = parse(rest, options)
            finally:  # for the line about what could not be parsed, too
                log.set_up(options)
            if argv:
                return run(options, argv)
        if command in ("run", "-h", "--help"):  # run without argv: help was asked for
            print_help()
        elif command == "--version":
            print(VERSION, flush=True)
        else:
            raise Failure(f"there is no command {command!r}; usage: {USAGE}", INSTEAD.get(command, SEE_HELP))
        return 0
    except KeyboardInterrupt:
        return EXIT_SIGNAL + signal.SIGINT
    except Exception as error:
        return log.failure(error)


# ---- What mydocker says: Failure, Log ------------------------------------------------------------


class Failure(Exception):
    """The end of a run: a line for the user, at most one more with the remedy, the exit status."""

    def __init__(self, message, hint="", status=EXIT_MYDOCKER):
        super().__init__(message)
        self.hint, self.status = hint, status


class Log:
    """All that mydocker says, on stderr: stdout is the command's. The options say how."""

    fd = 2
    explain = json = None  # json: the module, if lines are to be JSON
    side = "run"  # or "init": which of the two processes speaks
    end = b"\n"  # b"\r\n" while the caller's terminal is raw

    def set_up(self, options):
        """Take --log-format and --explain from the options; leave descriptor 2 to the command."""
        self.explain = options.explain
        self.fd = open_unblocked(2)
        if options.log_format == "json":
            import json  # 7 ms, for those who want it
            self.json = json

    def line(self, level, text):
        """Write one line."""
        text = os.fsencode(text).decode("utf-8", "backslashreplace")
        if self.json:
            text = self.json.dumps({
                "level": level, "msg": text, "source": f"mydocker.py:{self.side}",
                "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}, separators=(",", ":"))
        # a name that an image or a caller chose must not add a line, nor speak to the terminal
        data = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text).encode() + self.end
        try:  # a stderr that is stopped or gone must not change the end; but --explain loses no step
            while data and poll({self.fd: select.POLLOUT}, math.inf if self.explain else 1):
                data = data[os.write(self.fd, data) :]
        except OSError:
            pass

    def warning(self, message):
        """Say what the user should know of a run that goes on."""
        self.line("warning", f"mydocker: {message}")

    def failure(self, error):
        """Say why a run has ended, and the remedy if there is one; return the exit status."""
        message, hint = str(error), getattr(error, "hint", "")
        if isinstance(error, OSError):
            message = f"{error.filename}: {error.strerror}" if error.filename else error.strerror or message
            for row in HINTS.split("\n"):
                part, symbol, remedy = row.split("  ")
                if errno.errorcode.get(error.errno) == symbol and part in message:
                    hint = remedy
        elif not isinstance(error, Failure):
            message = f"internal error: {type(error).__name__}: {error}"  # a mistake in this file
        self.line("error", f"mydocker: {message}")
        if hint:
            self.line("error", f"  hint: {hint}")
        return getattr(error, "status", EXIT_MYDOCKER)


log = Log()

# ---- System calls: call() is the one door to the kernel ------------------------------------------

# AUDIT_ARCH_* of <linux/audit.h>; and which column of numbers below it is
ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7, "riscv64": 0xC00000F3,
                "loongarch64": 0xC0000102}.get(os.uname().machine)
COLUMN = ARCHITECTURE != 0xC000003E

# What C calls by these names: what Python's modules have of it, the rest from the kernel's headers
NAMES = {**vars(os), **vars(fcntl), **vars(termios), **vars(signal)}
for row in """
0=0 CLONE_NEWNS=0x20000 CLONE_NEWCGROUP=0x2000000 CLONE_NEWUTS=0x4000000 CLONE_NEWIPC=0x8000000
CLONE_NEWUSER=0x10000000 CLONE_NEWPID=0x20000000 CLONE_NEWNET=0x40000000 MS_RDONLY=0x1 MS_NOSUID=0x2
MS_NODEV=0x4 MS_NOEXEC=0x8 MS_REC=0x4000 MS_PRIVATE=0x40000 MS_STRICTATIME=0x1000000 MNT_DETACH=0x2
OPEN_TREE_CLONE=0x1 OPEN_TREE_CLOEXEC=0o2000000 MOUNT_ATTR_RDONLY=0x1 MOUNT_ATTR_NOSUID=0x2
MOUNT_ATTR_NODEV=0x4 MOUNT_ATTR_NOEXEC=0x8 MOVE_MOUNT_F_EMPTY_PATH=0x4 MOVE_MOUNT_T_EMPTY_PATH=0x40
AT_FDCWD=-100 AT_EMPTY_PATH=0x1000 AT_RECURSIVE=0x8000 RESOLVE_NO_MAGICLINKS=0x2 RESOLVE_NO_SYMLINKS=0x4
RESOLVE_IN_ROOT=0x10 PR_SET_PDEATHSIG=1 PR_SET_SECCOMP=22 PR_CAPBSET_DROP=24 PR_SET_NO_NEW_PRIVS=38
SECCOMP_MODE_FILTER=2 PTRACE_CONT=7 PTRACE_DETACH=17 PTRACE_SEIZE=0x4206 PTRACE_O_TRACEEXEC=0x10
KEYCTL_JOIN_SESSION_KEYRING=1 RLIMIT_NPROC=6 AF_UNIX=1 SOCK_DGRAM=2 SOCK_CLOEXEC=0o2000000 SIOCSIFFLAGS=0x8914
TIOCSPTLCK=0x40045431
""".split():  # <linux/sched.h> mount.h fcntl.h openat2.h prctl.h seccomp.h ptrace.h keyctl.h, <sys/socket.h>
    _name, _value = row.split("=")
    NAMES[_name] = int(_value, 0)

# A letter for each argument, as in section 2 of the manual: s a string or struct, or what Python has for it,
# i int, o int shown in octal, L unsigned long; for a call that is not here at most four, all s. Python's
# function of that name makes the call, else libc's. Not every libc has those with numbers, on x86_64 and on
# the others: syscall(2) makes them.
_PROTOTYPES = dict(row.split(":", 1) for row in """
    capset:ss chmod:so close_range:iii:436:436 flock:ii ftruncate:ii ioctl:iis keyctl:is:250:219 kill:ii
    makedirs:sos mkdir:so mknod:sos mount:sssLs mount_setattr:isisL:442:442 move_mount:isisi:429:429 open:sio
    open_tree:isi:428:428 openat2:issL:437:437 pipe2:i pivot_root:ss prctl:iLLLL ptrace:iiLL
    sethostname:sL setrlimit:is signalfd:isi socket:iii tcsetattr:iis umount2:si unshare:i waitpid:ii
    """.split())
_libc = ctypes.CDLL(None, use_errno=True)  # the libc that Python itself runs on, glibc or musl
PAGE = os.sysconf("SC_PAGE_SIZE")


def value_of(arg, letter="i"):
    """Return an argument as the kernel takes it: for flags by their names, MS_REC|MS_PRIVATE, the value."""
    if not isinstance(arg, str):
        return arg
    return sum(NAMES[name] for name in {*arg.split("|")}) if letter in "iL" else os.fsencode(arg)

def show(arg, letter=" "):
    """Return one argument or result of a call as a C programmer would write it."""
    if arg is None:
        return "NULL"
    if letter == "o":
        return f"0{arg:o}"
    if letter in "iL" and isinstance(arg, str):
        return arg
    text = repr(arg).replace("'", '"')
    if isinstance(arg, bytes):
        words = os.fsdecode(arg).rstrip("\0\n").replace("\0", " ").replace("\n", " ")
        text = f'"{words}"' if words.isprintable() and words else f"<struct of {len(arg)} bytes>"
    return text if len(text) <= 200 else text[:197] + "..."

def call(name, *args, why):
    """Make the system call `name`, return its result; raise OSError, whose text says what it was for.

    `why` is what --explain says of the call, and how the message begins if it fails. What changes something
    outside this process comes through here, so --explain shows it. Where the call takes a number, str names
    flags; elsewhere it becomes bytes as by os.fsencode."""
    letters, *numbers = _PROTOTYPES.get(name, "ssss").split(":")
    raw = map(value_of, args, letters)

    def tell(result):
        """Tell the call and its result, if --explain is on; return how it is shown."""
        shown = f"{name}({', '.join(map(show, args, letters))})"
        if log.explain:
            log.line("info", f"[{os.getpid():>7} {log.side:4}] {shown} = {result}   # {why}")
        return shown

    if name == "execve":  # when it succeeds nobody is left to tell
        tell("?")
    try:
        if name in NAMES:
            result = NAMES[name](*raw)
        elif numbers:
            result = call_libc("syscall", int(numbers[COLUMN]), *raw)
        else:
            result = call_libc(name, *raw)
    except (OSError, termios.error) as error:
        number = error.args[0]
        shown = tell(f"-1 {errno.errorcode.get(number, number)}")
        # Python makes it a FileNotFoundError, PermissionError...
        raise OSError(number, f"{why}: {shown}: {os.strerror(number)}") from None
    if log.explain and (name != "fork" or result):  # fork returns twice, the story goes on once
        tell(show(result or 0))
    return result

def call_libc(name, *args):
    """Make a call by libc, raise OSError at -1. A number fills a register: C takes of it what it needs."""
    result = _libc[name](*[ctypes.c_ulong(arg) if isinstance(arg, int) else arg for arg in args])
    if result == -1:
        raise OSError(ctypes.get_errno(), "")
    return result


# Part of a failed call, its error, the remedy where the error misleads or has one cause; the last row counts
HINTS = """\
(  EPERM  a capability is missing, as in a container without --privileged, or a filter forbids it
mount("overlay"  ENODEV  this kernel lacks overlay; on the host: modprobe overlay
mount("overlay"  EINVAL  no --upperdir on overlay, no third overlay on two, no casefolding filesystem
mount("overlay"  ELOOP  the same directory twice: each --rootfs has to be another
mount("overlay"  EOVERFLOW  the rootfs is another user's: build it as this one, or use sudo
MS_NOSUID|MS_NODEV|MS_NOEXEC  EPERM  /proc or /sys is missing here, or covered in part: it takes sudo
pivot_root  EINVAL  an initramfs cannot be swapped: mount another root, and switch_root to it
MS_PRIVATE  EINVAL  this is a chroot: unshare --mount, bind it on itself, and pivot_root into it
CLONE_NEWUSER  EPERM  sudo sysctl kernel.unprivileged_userns_clone=1, or use sudo; or a --privileged container
CLONE_NEWUSER  ENOSPC  sudo sysctl user.max_user_namespaces=15000, or use sudo
CLONE_NEWUSER  EINVAL  this kernel has no user namespaces: use sudo
in the user namespace  EPERM  sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0, or use sudo
join the cgroup  EINVAL  a real-time caller has no budget in a new cgroup: chrt --other 0 python3 ...
in the rootfs  ELOOP  a symlink in its place is refused: it could lead out of the rootfs
in the container  EACCES  a directory of the rootfs is another user's: build it as this one, or use sudo
move_mount  EINVAL  a file goes on a file, a directory on a directory
LOCK_NB  EAGAIN  in use: another container is using it
(  ENOSYS  mydocker needs Linux 5.12 or newer, and no filter that hides it (systemd's RestrictSUIDSGID=)"""


def attempt(step, *args, only="", **keywords):
    """Take a step that may fail, `only` by these errors if they are named: return its result, or None."""
    try:
        return step(*args, **keywords)
    except OSError as error:
        if only and errno.errorcode.get(error.errno) not in only.split():
            raise

def be_child(unwanted, step, *args):
    """Be the child of a fork: close what is the parent's, take a step that ends by execve, or tell why."""
    status = EXIT_MYDOCKER
    try:
        for fd in unwanted:
            os.close(fd)
        step(*args)
    except BrokenPipeError:
        pass  # the parent has died, and with it the one to tell
    except BaseException as error:  # whatever it is: no container
        status = log.failure(error)
    finally:
        os._exit(status)  # a child that went on would clean up for the parent

def mount(fstype, target, flags, data, why):
    """Attach a new filesystem. See mount(2)."""
    if len(os.fsencode(data)) >= PAGE:  # the kernel would cut it off unsaid
        raise Failure(f"{why}: mount(2) takes no more than a page of options: too many, or too long")
    call("mount", fstype, target, fstype, flags, data, why=why)

def at(fd):
    """Return a path to what `fd` refers to; it has no comma or colon for overlay to take for its own."""
    return f"/proc/self/fd/{fd}"

def read_file(path, why):
    """Return the text of a file, or what comes through a pipe until EOF."""
    fd = call("open", path, "O_RDONLY|O_CLOEXEC", why=why)
    data = call("read", fd, 1 << 16, why=why)
    while chunk := os.read(fd, 1 << 20):
        data += chunk
    os.close(fd)
    return os.fsdecode(data)

def write_file(path, value, why):
    """Write `value` to an existing file, in a single write(2), as files of the kernel require."""
    fd = call("open", path, "O_WRONLY|O_CLOEXEC", why=why)
    call("write", fd, value.encode(), why=f"{why} ({path})")
    os.close(fd)

def poll(interests, seconds):
    """Wait for {descriptor: events} at most that many seconds; return those that are ready. See poll(2)."""
    waiter = select.poll()
    for interest in interests.items():
        waiter.register(*interest)
    return dict(waiter.poll(min(max(0, seconds * 1000), 1 << 30)))

def open_unblocked(fd):
    """Return a descriptor like `fd`. A terminal is opened anew: O_NONBLOCK is seen by all who share one."""
    return os.isatty(fd) and attempt(os.open, at(fd), value_of("O_RDWR|O_NOCTTY|O_NONBLOCK")) or os.dup(fd)


# ---- Options, what can be asked for: OPTIONS, LIMITS, parse, prepare -----------------------------

# This table is the parser and the help: names, what the option takes (LOW..HIGH: whole numbers; a|b: one of
# these; ...: repeatable; else: PARSERS), what it is for. An option is a row here and one in the README.
OPTIONS = """\
-i --interactive            |                      | keep stdin open; without it stdin is /dev/null
-t --tty                    |                      | give the command a terminal of its own
-m --memory                 | SIZE                 | memory limit: bytes, or with b, k, m, g, t
--memory-swap               | SWAP                 | memory plus swap (default: twice --memory); -1 = no limit
--memory-swappiness         | 0..100               | cgroup v2 has 0 only, which is no swap
-c --cpu-shares --cpushare  | 2..262144            | CPU weight against others, 1024 = normal
--cpus                      | CPUS                 | at most this many CPUs' worth of time, such as 0.5
--cpuset-cpus --cpuset      | LIST                 | run on these CPUs only, such as 0-1,3
--cpuset-mems               | LIST                 | use memory of these NUMA nodes only, such as 0
--pids-limit                | -1..4194304          | processes and threads (default: 2048); -1 = no limit
--ulimit                    | NAME=SOFT[:HARD]...  | limit each process, such as nofile=1024; see getrlimit(2)
--oom-score-adj             | -1000..1000          | whom the kernel kills first when memory runs out
--rootfs                    | DIR...               | root filesystem, never written to; else the host's view
--upperdir                  | DIR                  | keep what is written in DIR, to go on with it later
--read-only                 |                      | make the root read-only
-v --volume                 | SRC:DST[:ro]...      | show the host's SRC at DST
--tmpfs                     | DST[:OPTIONS]...     | an empty filesystem in memory; size=, mode=, exec, others
--shm-size                  | SIZE                 | of /dev/shm (default: 64m)
--device                    | SRC[:DST]...         | a device of the host's in /dev inside
-w --workdir                | PATH                 | start there, made if missing
-e --env                    | K[=V]...             | set an environment variable; K alone copies the caller's
--env-file                  | ENV_FILE...          | lines of K=V or K, before those of --env
-u --user                   | USER[:GROUP]         | names in the container's /etc, or numbers
--group-add                 | GROUP...             | one supplementary group more
-h --hostname               | HOST                 | host name (default: the container's id)
--name                      | NAME                 | name of the cgroup; refused while in use
--add-host                  | NAME:IP...           | a line of /etc/hosts
--network --net             | none|host            | loopback alone (default: none), or the host's network
--cap-add                   | CAP...               | one capability more, or ALL
--cap-drop                  | CAP...               | one capability less, or ALL
--security-opt              | WORD...              | no-new-privileges=false, seccomp=unconfined
--privileged                |                      | all capabilities, no filter, no masks: for trusted code
--rm                        |                      | accepted: a container is always removed
--pidfile                   | FILE                 | write the command's pid on the host to FILE
--cgroup-parent             | CGROUP               | make the cgroup below this one, such as /batch.slice
--stop-timeout              | SECONDS              | from the first TERM, INT or HUP to the kill (default: 10)
--explain                   |                      | tell on stderr what is done, call by call, and why
--log-format                | text|json            | how mydocker's own lines look (default: text)"""
DEFAULTS = {"pids_limit": 2048, "user": "", "network": "none", "stop_timeout": 10.0, "shm_size": 64 << 20}

# The options that are limits: controller, v1 file, v2 file. In this order: v1 refuses a memsw limit below
# the memory limit; on v2 --memory-swappiness 0 is a second value for memory.swap.max, which has to replace
# the first. Adding a limit is adding a row here and one above; limit_value() has what is not written as is.
LIMITS = """\
--memory             memory  memory.limit_in_bytes        memory.max
--memory-swap        memory  memory.memsw.limit_in_bytes  memory.swap.max
--memory-swappiness  memory  memory.swappiness            memory.swap.max
--cpu-shares         cpu     cpu.shares                   cpu.weight
--cpus               cpu     cpu.cfs_quota_us             cpu.max
--cpuset-cpus        cpuset  cpuset.cpus                  cpuset.cpus
--cpuset-mems        cpuset  cpuset.mems                  cpuset.mems
--pids-limit         pids    pids.max                     pids.max"""
# What docker reads as if the option were not there
NOT_SET = """--memory=0 --memory=0m --memory=0g --memory-swap=0 --memory-swappiness=-1 --cpu-shares=0 --cpus=0
    --cpus=0.0 --cpus=0.00 --pids-limit=0 --user= --cpuset-cpus= --cpuset-mems= --name= --hostname=""".split()
# What docker run has and this has not: what to do instead
INSTEAD = {name: remedy for row in """\
init  it is no command of its own, it is what run() forks
-d --detach  it stays in the foreground: & or systemd-run puts it into the background
-p --publish -P --publish-all  there is no network to publish a port from: --network host has the host's ports
--mount  -v SRC:DST[:ro] binds, --tmpfs DST makes one in memory
--entrypoint  there are no images, so no entrypoint: the command line is what runs
--init  the command is PID 1: give it an init of the rootfs to run it, such as tini or dumb-init
--restart  a supervisor does that: systemd-run -p Restart=always
--platform --pull  there are no images to choose from: --rootfs names a directory""".split("\n")
           for names, remedy in [row.split("  ")] for name in names.split()}
SEE_HELP = "mydocker.py run --help lists the options"
USAGE = "mydocker.py run [OPTIONS] COMMAND [ARG...]"

# <linux/capability.h>: the place in the list is the number
CAPABILITIES = """CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP
    LINUX_IMMUTABLE NET_BIND_SERVICE NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE
    SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT SYS_ADMIN SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME
    SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE MAC_ADMIN SYSLOG
    WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE""".split()
# <asm-generic/resource.h>: the same
RESOURCES = """cpu fsize data stack core rss nproc nofile memlock as locks sigpending msgqueue nice rtprio
    rttime""".split()


class Option:
    """A row of OPTIONS."""

    def __init__(self, row):
        names, self.metavar, self.text = map(str.strip, row.split(" | "))
        self.names = names.split()
        self.long = max(self.names, key=len)
        self.dest = self.long[2:].replace("-", "_")


TABLE = list(map(Option, OPTIONS.split("\n")))
# every name with a dash less as well: -cpuset and -cpushare are those of xianlubird/mydocker, the book's
BY_NAME = {word: option for option in TABLE for name in option.names for word in (name, name[1:])}


class Options:
    """What `run` was asked for: an attribute for each row of OPTIONS. Sizes in bytes, times in seconds."""

    layer_lock = -1  # the --upperdir, locked
    process_limit = b""  # struct rlimit, where there is no cgroup for --pids-limit

    def __init__(self):
        for option in TABLE:
            setattr(self, option.dest, [] if "..." in option.metavar else DEFAULTS.get(option.dest))
        self.asked = set()  # the options that came with a value, as opposed to defaults
        self.name = self.hostname = os.urandom(6).hex()  # the container's id
        # root of a user namespace is its maker; the map of the first one is the whole range, or missing
        self.rootless = os.geteuid() != 0 or exists("/proc/self/uid_map") and (
            "4294967295" not in read_file("/proc/self/uid_map", "is root here the machine's"))
        self.cwd = attempt(os.getcwd) or ""  # the caller's directory; "" when it has been deleted


def check(good, value=None):
    """Return a good value, refuse another: parse() makes of the ValueError a line that says what it takes."""
    if not good:
        raise ValueError
    return value

def parse_number(text, low, high):
    """Return a number of the type of `low`, in plain digits: int() and float() take more than that."""
    number = type(low)(text)
    return check(low <= number <= high and not text.strip("-.0123456789") and not text.endswith("."), number)

def parse_size(text):
    """Return the bytes that `text` stands for: 100m, 1.5g, 64MiB, 1048576."""
    text = text.lower().replace("ib", "b").removesuffix("b")
    number = text.rstrip("kmgt")
    size = parse_number(number, 0.0, math.inf)
    size *= 1024 ** " k m g t".split(" ").index(text.removeprefix(number))
    return math.ceil(check(1 <= size <= (1 << 63) - PAGE, size) / PAGE) * PAGE  # the kernel counts pages

def parse_list(text):
    """Return the numbers of a list such as 0-1,3. See cpuset(7), "List format"."""
    numbers: "set[int]" = set()
    for part in text.split(","):
        first, dash, last = part.partition("-")
        low = parse_number(first, 0, 65535)
        numbers.update(range(low, parse_number(last if dash else first, low, 65535) + 1))
    return numbers

def parse_ulimit(text):
    """Return (name, struct rlimit) of NAME=SOFT[:HARD]; -1 is RLIM_INFINITY."""
    name, _, values = text.partition("=")
    limits = [parse_number(part, -1, 1 << 62) % (1 << 64) for part in values.split(":", 1)]
    check(name in RESOURCES and limits == sorted(limits))
    return name, struct.pack("2Q", limits[0], limits[-1])

def parse_inside(text):
    """Return an absolute path in the container."""
    return check(text.startswith("/"), os.path.normpath("/" + text.lstrip("/")))

def parse_volume(text):
    """Return (target, source, flags) of SRC:DST[:ro|rw|z|Z,...]; a colon in SRC is part of its name."""
    rest, _, mode = text.rpartition(":")
    if not {"ro", "rw", "z", "Z"}.issuperset(mode.split(",")):  # z and Z are for SELinux: nothing to do
        rest, mode = text, ""
    source, _, target = rest.rpartition(":")
    return parse_inside(target), check(source, source), "MOUNT_ATTR_RDONLY" if "ro" in mode else "0"

def parse_tmpfs(text):
    """Return (target, mount flags, options) of DST[:OPTIONS]; tmpfs(5) lists them, the kernel checks them."""
    target, _, rest = text.partition(":")
    # by what they are about: of exec and noexec the last one counts
    words = {word.removeprefix("no"): word for word in f"noexec,nosuid,nodev,{rest}".split(",")}
    flags = [f"MS_{words.pop(name).upper()}" for name in "exec suid dev".split()]
    return parse_inside(target), "|".join(filter(NAMES.get, flags)) or "0", ",".join(words.values())

def parse_device(text):
    """Return (target, source) of SRC[:DST[:rwm]]; other permissions would take a controller of their own."""
    source, _, target = text.removesuffix(":rwm").partition(":")
    return parse_inside(target or source), check(source and ":" not in target, source)

def parse_env(text):
    """Return K=V or K; no variable has an empty name, or a NUL."""
    return check(not text.startswith("=") and "\0" not in text, text)

def parse_env_file(text):
    """Return the variables in a file, K=V or K, as docker reads it: nothing is quoted, # is a comment."""
    lines = read_file(text, f"--env-file {text}").replace("\r\n", "\n").split("\n")
    words = [parse_env(word) for word in map(str.lstrip, lines) if word and word[0] != "#"]
    return check(all({" ", "\t"}.isdisjoint(word.partition("=")[0]) for word in words), words)

def parse_host(text):
    """Return a line of /etc/hosts of NAME:IP."""
    name, _, address = text.partition(":")
    return check(address and not address.strip("0123456789abcdefABCDEF.:"),
                 f"{address}\t{parse_name(name)}\n")

def parse_security(text):
    """Return a word of --security-opt, as far as it means something here; an older form has a colon."""
    text = text.replace(":", "=", 1)
    return check(text.startswith(("label=", "apparmor=")) or text in (
        "seccomp=unconfined no-new-privileges no-new-privileges=true no-new-privileges=false".split()), text)

def parse_name(text, longest=200):
    """Return a name for the host or the cgroup: no slash, so it is no path; no newline, so no second line."""
    return check(text[:1].isalnum() and len(text) <= longest and not text.strip(
        "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-"), text)

def parse_capability(text):
    """Return the name of a capability as in CAPABILITIES, or ALL."""
    name = text.upper().removeprefix("CAP_")
    return check(name in [*CAPABILITIES, "ALL"], name)


PARSERS: "dict" = {
    "": lambda text: "0 f false 1 t true".split().index(text.lower()) > 2,  # --tty=false, by Go's ParseBool
    "SIZE": parse_size, "SWAP": lambda text: -1 if text == "-1" else parse_size(text),
    "CPUS": lambda text: parse_number(text, 0.01, os.cpu_count()), "CAP...": parse_capability,
    "SECONDS": lambda text: parse_number(text, 0.0, math.inf), "NAME=SOFT[:HARD]...": parse_ulimit,
    "LIST": lambda text: parse_list(text) and text, "SRC:DST[:ro]...": parse_volume, "PATH": parse_inside,
    "DST[:OPTIONS]...": parse_tmpfs, "SRC[:DST]...": parse_device, "K[=V]...": parse_env,
    "ENV_FILE...": parse_env_file, "NAME": parse_name, "HOST": lambda text: parse_name(text, 64),
    "NAME:IP...": parse_host, "WORD...": parse_security,
    "CGROUP": lambda text: "/" + check({"", ".", ".."}.isdisjoint(text.strip("/").split("/")),
                                       text.strip("/")),  # from the top of its hierarchy, and no way back up
}


def parse(words, options):
    """Fill in the options and return the command of `run`, or none where help is asked for."""
    # not by argparse, which takes the command's own words for options (sh -c, stress -m) and costs 8 ms
    while words and words[0].startswith("-") and words[0] != "-":
        word = words.pop(0)
        if word == "--help":
            return []
        if word == "--":
            break
        name, equals, value = word.partition("=")
        if word[1] != "-" and name not in BY_NAME:  # -m100m is -m 100m, and -ti is -t -i
            name, equals, value = word[:2], "", word[2:]
        option = BY_NAME.get(name)
        if not option:
            raise Failure(f"run: there is no option {name}", INSTEAD.get(name, SEE_HELP))
        kind = option.metavar
        if kind:
            value = value if value or equals or not words else words.pop(0)
        elif not equals:
            if value:
                words.insert(0, "-" + value)
            value = "true"
        if f"{option.long}={value}" in NOT_SET:
            continue
        try:
            if kind[-1:].isdigit():
                parsed = parse_number(value, *map(int, kind.split("..")))
            else:
                check(value and ("|" not in kind or value in kind.split("|")))
                parsed = PARSERS.get(kind, str)(value)
        except ValueError:
            raise Failure(f"run: {name} {value!r}: it takes {kind or 'true or false'}: {option.text}")
        setattr(options, option.dest, getattr(options, option.dest) + [parsed] if "..." in kind else parsed)
        options.asked.add(option.long)
    if not words:
        raise Failure("run: no command given", SEE_HELP)
    return words

def prepare(options):
    """Refuse what cannot work, and fill in what follows from the rest, before anything is done."""
    if os.readlink("/proc/self") != str(os.getpid()):  # we would take strangers for our processes
        raise Failure("/proc is that of another pid namespace", "mount -t proc proc /proc")
    memory = options.memory or 0
    swap = options.memory_swap = options.memory_swap or min(2 * memory, (1 << 63) - PAGE) or None
    if swap and (not memory or -1 < swap < memory):
        raise Failure("--memory-swap: memory and swap together, so no less than --memory, and not without it")
    for kind, wanted in ("cpu", options.cpuset_cpus), ("node", options.cpuset_mems):
        if wanted:
            available = read_file(f"/sys/devices/system/{kind}/online", "which are there").strip()
            if not parse_list(wanted) <= parse_list(available):
                raise Failure(f"--cpuset {wanted}: not all of these {kind}s exist; available: {available}")
    if options.upperdir and is_below(os.path.realpath(f"{options.upperdir}/layer"),
                                     tuple(map(os.path.realpath, options.rootfs))):
        raise Failure(f"--upperdir {options.upperdir}: it is in the --rootfs, which is never written to")
    rows = options.volume + options.device
    for path in [f"{top}/." for top in options.rootfs] + [row[1] for row in rows]:
        os.stat(path)  # raises where it is not there, or no directory
    targets = options.targets = [row[0] for row in rows + options.tmpfs]
    if len(targets) > len(set(targets)):
        raise Failure(f"two mounts are to go on {max(targets, key=targets.count)}")
    if options.rootless and not options.rootfs and options.asked & {"--upperdir", "--add-host"}:
        raise Failure("--upperdir, --add-host: without root the host's view is read-only", "--rootfs or sudo")
    if options.network == "host" and "--hostname" not in options.asked:
        options.hostname = os.uname().nodename


# ---- Cgroups, what it may use: make_cgroups, Cgroup ----------------------------------------------

# Why a limit cannot be set, and the remedy
NO_CONTROLLER = ("there is no controller for it here", "/proc/cgroups shows which there are, /proc/mounts "
                 "which are in reach; some kernels want cgroup_enable=memory swapaccount=1 when they boot")
OWN_CGROUP = ("as root, or in a cgroup of your own: systemd-run --user --scope -p Delegate=yes python3 "
              "mydocker.py run ...; in a container: limit that, or start it with --privileged")


def make_cgroups(options, undo):
    """Make the container's cgroups with all limits; return those that init is to join.

    A controller (memory, cpu) bounds one resource. v1 has a tree of cgroups for each of them, v2 one for all;
    a hybrid host has some of each. See cgroups(7)."""
    found = find_cgroups()
    joined, lost = [], {}  # lost: the limits that are not set yet, and whose they are
    for row in LIMITS.split("\n"):
        name, controller, *files = row.split()
        value = getattr(options, BY_NAME[name].dest)
        if value not in (None, -1):  # a new cgroup has no limit
            cgroup = lost[name] = found.get(controller, found.get("", Cgroup("", "", "")))
            text = str(limit_value(name, value, cgroup.is_v2, options.memory))
            cgroup.limits[name] = controller, files[cgroup.is_v2], text
    for cgroup in dict.fromkeys(found.values()):
        if cgroup.is_v2 and not cgroup.limits and len(found) > 1:
            continue  # beside v1 it is systemd's; alone it is made always: the container sees one of its own
        try:
            cgroup.make(options, undo)
        except OSError as error:
            if errno.errorcode.get(error.errno) not in "ENOENT ENOTDIR EACCES EPERM EROFS".split():
                raise
            cgroup.problem = f"no cgroup here is ours to use: {error.strerror}", OWN_CGROUP
            continue
        joined.append(cgroup)
        for name in cgroup.limits:
            del lost[name]
    if options.cgroup_parent and not joined:
        raise Failure(f"--cgroup-parent: no cgroup can be made below {options.cgroup_parent}",
                      "it has to be there, as mkdir makes it below /sys/fs/cgroup, and to be yours")
    if options.rootless and lost.pop("--pids-limit", None):
        # in a user namespace the kernel counts its processes alone, run() with them, no others of this user
        options.process_limit = struct.pack("2Q", options.pids_limit + 1, options.pids_limit + 1)
    for name in lost:
        if name in options.asked:  # what was not asked for does not end the run
            why, hint = lost[name].problem
            raise Failure(f"{name}: {why}", hint)
    return joined

def find_cgroups():
    """Return {controller: Cgroup}, v2's under "". A JVM that misses one of v1's ignores --memory: so all."""
    found = {}
    for line in read_file("/proc/self/cgroup", "find the cgroups we are in").split("\n")[:-1]:
        _, controllers, path = line.split(":", 2)
        names = controllers.split(",")
        if {"", "cpuacct", *LIMITS.split()}.isdisjoint(names) or path.startswith("/.."):
            continue  # no limits of ours; outside of our namespace
        for top, root in find_cgroup_mounts(controllers):
            own = (top + path[len(root) :]).rstrip("/")
            if is_below(path, (root,)) and os.path.exists(f"{own}/cgroup.procs"):
                found.update(dict.fromkeys(names, Cgroup(controllers, top, own)))
                break
    return found

def find_cgroup_mounts(controllers):
    """Yield where the hierarchy of these controllers may be mounted, and from which cgroup of it on."""
    for name in [f"/{controllers}"] if controllers else ["", "/unified"]:
        yield f"/sys/fs/cgroup{name}", ""
    for _, _, root, point, fstype, words in read_mountinfo():  # last: 9 ms, where 5000 are mounted
        if (fstype == ("cgroup" if controllers else "cgroup2")
                and {*controllers.split(",")} <= {"", *words.split(",")}):
            yield point, root.rstrip("/")

def limit_value(name, value, is_v2, memory):
    """Return what to write for this option on cgroup v1 or v2; `memory` is what --memory has."""
    if name == "--cpus":
        return round(value * 100000)  # in a period of that many microseconds, the kernel's default
    if not is_v2:
        return value
    if name == "--memory-swap":  # v2's is for swap alone
        return value - memory
    if name == "--memory-swappiness" and value:
        raise Failure("--memory-swappiness: cgroup v2 has none; 0 is possible: no swap")
    if name == "--cpu-shares":  # not the kernel's; the curve of runc 1.3.2, crun 1.23
        log2 = math.log2(value)
        return math.ceil(10 ** ((log2 - 1) * (log2 + 126) / 612))
    return value


class Cgroup:
    """The container's cgroup in one hierarchy: PARENT/mydocker-NAME. Its methods run outside.

    It belongs to whoever holds a lock on its directory: run(), to the end. One without a lock is what a
    killed run() left: by that, and not by a pid, runs of different pid namespaces know each other's.
    On v2 the processes are one level below, in mydocker-NAME/container: systemd rewrites its own
    cgroup.subtree_control at every daemon-reload, and controllers that are handed down no further, and with
    them the limits, would vanish without a word ("top-down constraint" in cgroup-v2.rst)."""

    directory = leaf = ""
    problem = NO_CONTROLLER  # why a limit cannot be set, and the remedy

    def __init__(self, controllers, top, own):
        self.is_v2 = not controllers
        self.controllers, self.top, self.own = controllers, top, own  # own: where we are in it
        self.limits, self.joins = {}, []  # option: (controller, file, value); (descriptor, what to write)

    def make(self, options, undo):
        """Make the cgroup, write every limit, read it back, open the files to join by."""
        parent = self.find_parent(options)
        if self.is_v2 and parent == self.own != self.top:
            self.leaf = f"{self.own}/mydocker-run-{os.urandom(6).hex()}"
            call("mkdir", self.leaf, 0o755, why="a leaf for run(): what hands down must have no processes")
            undo.append(self.leave_leaf)
            write_file(f"{self.leaf}/cgroup.procs", "0", "move there")
        directory = self.directory = f"{parent}/mydocker-{options.name}"
        sweep(parent, directory)
        try:
            claim(directory)
        except FileExistsError:
            raise Failure(f"--name {options.name}: in use by another container") from None
        undo.append(self.end)
        if self.is_v2:
            self.hand_down(parent if options.privileged else directory)
            call("mkdir", f"{directory}/container", 0o755, why="on v2 the processes are below the limits")
            self.set_limits(directory)
            joins = ["container/cgroup.procs 0"]
            if options.privileged:  # the upper one is to be the root of its namespace, to divide further
                divide = {f"cgroup.subtree_control +{row[0]}" for row in self.limits.values()}
                joins = ["cgroup.procs 0", *joins, *sorted(divide)]
            else:
                self.set_limits(f"{directory}/container")  # once more, where programs look for them
        else:
            if "cpuset" in self.controllers:
                inherit_cpuset(directory, "cpuset.cpus")
                inherit_cpuset(directory, "cpuset.mems")
            self.set_limits(directory)
            joins = ["tasks 0"]  # not cgroup.procs: one thread moves itself without the wait of hurry_join()
        for file, text in map(str.split, joins):
            fd = call("open", f"{directory}/{file}", "O_WRONLY|O_CLOEXEC", why="for init: it sees no path")
            self.joins.append((fd, text.encode()))

    def find_parent(self, options):
        """Return the cgroup below which ours goes."""
        if options.cgroup_parent:
            return self.top + options.cgroup_parent
        level = self.own
        if not self.is_v2:
            return level
        while level != self.top and not is_delegated(level):
            level = os.path.dirname(level)
        if level != self.top:
            # ours to divide; or a manager's such as Slurm: then it goes beside our own, so that the limits
            # of the job hold for it, too. With other processes in it, a cgroup can hand nothing down.
            place = level if level == self.own else os.path.dirname(self.own)
            if {str(os.getpid())}.issuperset(read_file(f"{place}/cgroup.procs", "who is here").split()):
                return place
        return self.top

    def hand_down(self, level):
        """Make the controllers reach what is below `level`: v2 hands down from each level to the next."""
        if level != self.top:
            self.hand_down(os.path.dirname(level))
        handed = read_file(f"{level}/cgroup.subtree_control", "what is handed down").split()
        for controller in sorted({row[0] for row in self.limits.values()}.difference(handed)):
            try:
                # with processes in it a level still hands some down, but as a "threaded" one: refused. So is
                # the root of a cgroup namespace; the true root, which may have some, has no cgroup.type
                if exists(f"{level}/cgroup.type") and read_file(f"{level}/cgroup.procs", "who is in"):
                    raise OSError(errno.EBUSY, f"{level} has processes, so it can hand nothing down")
                write_file(f"{level}/cgroup.subtree_control", f"+{controller}", "hand the controller down")
            except FileNotFoundError:  # it has not come down to here
                pass
            except OSError as error:  # set_limits() sees what has come down in the end
                self.problem = error.strerror, OWN_CGROUP

    def set_limits(self, directory):
        """Write each limit and read it back: a value that the kernel changed is not the one asked for."""
        for name, (_, file, value) in list(self.limits.items()):
            path = f"{directory}/{file}"
            try:
                write_file(path, value, f"set {name}")
            except FileNotFoundError:  # no such controller; for --memory-swap: this kernel counts no swap
                del self.limits[name]
                continue
            if "cpuset" in name and self.is_v2:  # v2 takes any, and then uses those that the parent has, too
                path += ".effective"
            back = read_file(path, "read it back").split()[0]  # in cpu.max the period follows
            meaning = parse_list if "cpuset" in name else str
            if meaning(back) != meaning(value):
                raise Failure(f"{name}: the kernel set {back} instead of {value} in {path}")

    def hurry_join(self):
        """On v2 wait for the kernel's cgroup lock now, while init makes its mounts.

        The first write to any cgroup.procs waits 5 to 20 ms for an RCU grace period, until every CPU has let
        go of what it was reading; one soon after does not. So run() writes itself into the cgroup that it is
        in, which changes nothing."""
        if self.is_v2:
            attempt(write_file, f"{self.leaf or self.own}/cgroup.procs", "0",  # not ours: init will wait
                    "let the kernel get ready for init's move")

    def end(self):
        """Say which limits were hit (that a child was killed is easily overlooked); remove the cgroup."""
        pids, memory = self.limits.get("--pids-limit"), self.limits.get("--memory")
        if pids and self.count("pids.events", "max"):
            log.warning(f"pids limit: the kernel refused forks at the limit of {pids[2]} processes")
        events = "memory.events" if self.is_v2 else "memory.oom_control"
        killed = memory and self.count(events, "oom_kill")
        if killed:
            where = f"{int(memory[2]) / 2**20:.10g} MiB limit"
            if self.is_v2 and not self.count(events, "oom"):
                where = "limit of a cgroup above"  # of a service, or a job
            log.warning(f"out of memory: the kernel killed {killed} process{'es' * (killed > 1)} at the "
                        f"{where}; files in the writable layer and /dev/shm count, too: --upperdir and -v "
                        "keep them on disk")
        remove_cgroup(self.directory)

    def count(self, file, event):
        """Return how often it has happened. Older kernels count where the process is, newer at the limit."""
        texts = [attempt(read_file, f"{self.directory}{place}/{file}", "what happened") or ""
                 for place in ("", "/container")]
        return max(int(dict(map(str.split, text.splitlines())).get(event, 0)) for text in texts)

    def leave_leaf(self):
        """Go back to where we were: a cgroup that hands something down takes no process."""
        for name in read_file(f"{self.own}/cgroup.subtree_control", "what is handed down").split():
            write_file(f"{self.own}/cgroup.subtree_control", f"-{name}", "hand nothing down any more")
        write_file(f"{self.own}/cgroup.procs", "0", "move back")
        call("rmdir", self.leaf, why="remove the leaf of run()")


def claim(directory):
    """Make a cgroup and lock it for as long as this process lives, which keeps the descriptor."""
    call("mkdir", directory, 0o755, why="the container's own cgroup")
    try:
        lock_cgroup(directory, "LOCK_EX")
    except FileNotFoundError:  # another run has swept it, before it was locked
        claim(directory)
    except OSError:
        attempt(call, "rmdir", directory, why="it cannot be locked")
        raise

def lock_cgroup(directory, how):
    """Return a descriptor that holds the lock of a cgroup. See flock(2)."""
    fd = os.open(directory, os.O_RDONLY)
    try:
        call("flock", fd, how, why="alive is who holds the lock")
        os.stat("cgroup.procs", dir_fd=fd)  # FileNotFoundError: the cgroup was removed meanwhile
    except OSError:
        os.close(fd)
        raise
    return fd

def sweep(parent, directory):
    """Remove what killed runs have left: one of this name, and a few others, lest a crowd slow the start."""
    found = {f"{parent}/{entry}" for entry in attempt(os.listdir, parent) or ()  # None: claim() will say why
             if entry.startswith("mydocker-")}
    for path in [directory, *found][:5]:  # a set has another order in each run, so all get their turn
        fd = attempt(lock_cgroup, path, "LOCK_EX|LOCK_NB")
        if fd:
            attempt(remove_cgroup, path)  # a busy one stays
            os.close(fd)

def remove_cgroup(directory):
    """Remove a cgroup and, on v2, the one below it."""
    if os.path.exists(f"{directory}/container"):
        call("rmdir", f"{directory}/container", why="remove the cgroup of the processes")
    call("rmdir", directory, why="remove the container's cgroup")

def is_delegated(cgroup):
    """Tell whether a v2 cgroup was handed over to be divided."""
    if os.geteuid():  # by systemd, to a user whom it then belongs to
        return os.access(f"{cgroup}/cgroup.subtree_control", os.W_OK)
    # to root everything is writable, which proves nothing: what it gave away by Delegate=yes has a mark
    return os.stat(cgroup).st_uid == 0 and not (
        {"trusted.delegate", "user.delegate"}.isdisjoint(os.listxattr(cgroup)))

def inherit_cpuset(directory, file):
    """Return what is in a file of a v1 cpuset, filled from the one above: an empty cpuset lets nobody in."""
    text = read_file(f"{directory}/{file}", "is it filled").strip()
    if not text:  # a --cgroup-parent may be empty, too
        text = inherit_cpuset(os.path.dirname(directory), file)
        write_file(f"{directory}/{file}", text, "v1 leaves it empty")
    return text


# ---- Root filesystem, what it has: Rootfs. In init, in a mount namespace of its own --------------

DEVICES = "/dev/null /dev/zero /dev/full /dev/random /dev/urandom /dev/tty".split()
DEVICE_LINKS = {"fd": "/proc/self/fd", "stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1",
                "stderr": "/proc/self/fd/2", "ptmx": "pts/ptmx"}
# What Docker hides or freezes of /proc and /sys: of these the kernel has one for all containers
MASKED_PATHS = """/proc/acpi /proc/asound /proc/interrupts /proc/kcore /proc/keys /proc/latency_stats
    /proc/sched_debug /proc/scsi /proc/timer_list /proc/timer_stats /sys/firmware
    /sys/devices/virtual/powercap""".split()
READ_ONLY_PATHS = "/proc/bus /proc/fs /proc/irq /proc/sys /proc/sysrq-trigger".split()
# The container's own in every view: the host's processes, hardware, devices and sockets stay outside
PRIVATE_PATHS = ("/proc", "/sys", "/dev", "/run")
# Filesystems that hold no files of the host's, wherever they are mounted
PSEUDO_FILESYSTEMS = """autofs binfmt_misc bpf cgroup cgroup2 configfs debugfs devpts devtmpfs efivarfs
    fusectl hugetlbfs mqueue nsfs proc pstore rpc_pipefs securityfs selinuxfs sysfs tracefs""".split()
INERT = "MS_NOSUID|MS_NODEV|MS_NOEXEC"  # for filesystems of which nothing is to be executed
# Mount point, type, flags, options or -, and why, by one space each; parents first. A mount is a row here
OWN_MOUNTS = """\
/proc proc {inert} - the processes of the new pid namespace
/sys sysfs {inert}|{frozen} - devices as the network namespace has them
/dev tmpfs MS_NOSUID|MS_STRICTATIME|{nodev} mode=755,size=64m no device of the host
/dev/pts devpts MS_NOSUID|MS_NOEXEC newinstance,ptmxmode=0666,mode=0620{tty} terminals of its own, from 0 on
/dev/shm tmpfs {inert} mode=1777,size={size} POSIX shared memory
/dev/mqueue mqueue {inert} - POSIX queues of the ipc namespace"""
RUN = """
/run tmpfs MS_NOSUID|MS_NODEV mode=755 in place of the host's
/run/lock tmpfs MS_NOSUID|MS_NODEV mode=1777 where Debian's /var/lock leads to"""
TMP = "\n/tmp tmpfs MS_NOSUID|MS_NODEV mode=1777 in place of the host's"
COVERED = "ENOENT ENOTDIR ELOOP"  # no way leads to a mount of the host's: another one is in front


class Rootfs:
    """The container's root filesystem. One of three; the last two are the host view:

    --rootfs             its directories, under an overlay with a writable layer
    none, as root        each filesystem of the host under such an overlay; /run is its own
    none, without root   the host's mounts, read-only, no layer; /run and /tmp are its own

    The new root is mounted over "/". That covers nothing from us: a path still begins below it, and "/.."
    climbs on top. What is wanted of the host is cloned; a clone is a mount that is attached nowhere yet. It
    gets its flags while nobody can see it, and is attached to a descriptor: no rename leads it elsewhere."""

    def __init__(self, options):
        self.options = options
        self.bound = options.rootless and not options.rootfs
        self.own_mounts = OWN_MOUNTS + RUN * (not options.rootfs) + TMP * self.bound
        self.nodev = "0" if options.privileged else "MS_NODEV"  # wherever a device node could be made
        self.to_freeze: "list[int]" = []  # the roots of overlays that are to be read-only
        # what furnish() attaches: (why, target, how to make it, flags of a tmpfs or a clone, options or None)
        self.mounts: "list" = [(f"--tmpfs {target}", target, "mkdir", flags, data)
                               for target, flags, data in options.tmpfs]

    def enter(self):
        """Assemble the root, make it "/", let go of the host's.

        pivot_root(".", ".") takes the directory we stand in for both arguments: it becomes the root, and the
        old root is stacked on top of it, for umount2(".") to find. See pivot_root(2)."""
        nodev = "0" if self.options.privileged else "MOUNT_ATTR_NODEV"
        for target, source, flags in self.options.volume:  # before anything of ours is mounted in there
            why = f"--volume {source}:{target}"
            clone = clone_tree(source, why, f"{nodev}|{flags}")
            self.mounts.append((why, target, "mkdir" if os.path.isdir(clone) else "mknod", clone, None))
        if self.bound:
            self.mount_bound_view()
        else:
            self.mount_overlays()
        self.mount_own()
        self.make_devices()
        call("fchdir", self.top, why="stand in the new root")
        call("pivot_root", ".", ".", why='the new root becomes "/"; the old one lies on it, until umount2')
        if not self.bound:
            call("umount2", ".", "MNT_DETACH", why="let go of the layer's tmpfs, which lies on the old root")
        call("umount2", ".", "MNT_DETACH", why="let go of the old root: no path leads to it any more")
        # ".." ends at a process's root, unless it stands outside of that. See chroot(2)
        call("chroot", "/proc", why="a root below us ...")
        call("chdir", "..", why="... does not keep us from climbing above the one that we had, ...")
        call("chroot", ".", why="... which is where we still are, unless that was in a chroot")
        if attempt(os.readlink, "/proc/self") != "1":  # as it is in our own proc; the climb led elsewhere
            raise Failure("this is a chroot, whose inside could be left for the true root above: refused",
                          "unshare --mount, bind the chroot on itself, and pivot_root into it")

    def mount_bound_view(self):
        """Make the root-to-be of the host's mounts, read-only, for who may not mount an overlay over them."""
        # in a user namespace they hang together: what is not to be seen cannot be left out, only covered
        log.warning("without root the host's files are read-only inside; /tmp and /run are its own")
        rows = list(read_mountinfo())  # as long as each is there but once
        attach(clone_tree("/", "the host's root with all mounts", "MOUNT_ATTR_RDONLY|MOUNT_ATTR_NODEV"),
               open_path("/", "the root"), "over the old root")
        self.top = open_path("/..", "the new root, mounted over the old")
        devices = {row[3]: row[1] for row in rows}
        # where a bind of something in the host's /run comes from: its filesystem, or that directory of "/"
        from_run = (devices.get("/run", "none"), devices["/"] + "/run")
        for _, device, root, point, fstype, _ in rows:
            if not is_below(point, (*PRIVATE_PATHS, "/tmp")) and (
                    fstype in PSEUDO_FILESYSTEMS or is_below(device + root, from_run)):
                why = f"cover the host's {point}"  # another proc, a bind of something in /run
                # where root may not enter nobody inside gets to it, either
                place = attempt(open_inside, point, why, "", self.top, only=f"{COVERED} EACCES")
                if place:
                    hide(place, why)

    def mount_overlays(self):
        """Make the root-to-be of an overlay of the rootfs, or of one for each filesystem of the host."""
        options = self.options
        lowers = [open_path(path, "a layer of --rootfs") for path in options.rootfs[::-1] or ["/"]]
        mount("tmpfs", "/", "MS_NOSUID", "mode=700", "what is written: it goes with the container")
        self.layer = self.tmpfs = open_path("/..", "what was mounted over the root")
        if options.upperdir:
            self.layer = open_path(f"{options.upperdir}/layer", "--upperdir", "O_DIRECTORY|O_NOFOLLOW|")
            if not os.path.sameopenfile(self.layer, options.layer_lock):
                raise Failure(f"--upperdir {options.upperdir}: its layer was exchanged meanwhile: refused")
        try:
            self.mount_overlay(lowers, "", "/")
        except OSError as error:
            if error.errno != errno.EINVAL or options.rootfs or options.asked & {"--upperdir", "--add-host"}:
                raise
            log.warning("overlay does not take the host's / (casefolding, encrypted, on two overlays): it is "
                        "read-only inside, and its sockets are in reach; /tmp and /run are its own")
            attach(clone_tree("/", "the host's /", "MOUNT_ATTR_RDONLY|MOUNT_ATTR_NODEV", "0"),
                   open_path("/", "the root"), "over the old root")
            self.own_mounts += TMP
        self.top = open_path("/..", "the new root, mounted over the old")
        self.to_freeze = [self.top] if options.read_only else []
        # a namespace just copied lists parents first
        for number, _, _, point, fstype, _ in () if options.rootfs else read_mountinfo():
            if point != "/" and fstype not in PSEUDO_FILESYSTEMS and not is_below(point, PRIVATE_PATHS):
                self.show_filesystem(point, number, lowers[0])

    def show_filesystem(self, path, number, host):
        """Show a filesystem of the host like its root, or read-only, or, where neither can be, not at all."""
        why = f"the host's {path}"
        try:
            lower = attempt(open_inside, path, why, "", host, only=COVERED)
            # another may be what is seen there, even the host's proc; a socket would be one of the host's
            if not lower or mount_id(lower) != number or (
                    stat.filemode(os.fstat(lower).st_mode)[0] not in "-d"):
                return
            target = open_inside(path, why, "", self.top)
            # no overlay: of a file, of a filesystem that it does not take, such as FAT, with too long a name
            if attempt(self.mount_overlay, [lower], path, at(target), only="EINVAL ENOTDIR ENAMETOOLONG"):
                if self.options.read_only:
                    self.to_freeze.append(open_inside(path, why, "", self.top))
                os.close(target)
            else:
                attach(clone_tree(at(lower), why, "MOUNT_ATTR_RDONLY|MOUNT_ATTR_NODEV", "0"), target, why)
            os.close(lower)  # there may be more mounts than descriptors
        except OSError as error:
            if errno.errorcode.get(error.errno) not in (  # deleted, a user's, its server dead
                    f"{COVERED} EACCES ENOTCONN ECONNREFUSED ESTALE EIO EINVAL".split()):
                raise
            log.warning(f"{why} cannot be shown inside: {os.strerror(error.errno)}")

    def mount_overlay(self, lowers, path, target):
        """Mount on `target` the directories `lowers`, topmost first, with a writable layer for `path`.

        What is written goes to upperdir; in workdir overlay prepares a file before it moves it there. No name
        can bring in an option. xino: one st_dev for all, or du -x skips files. See overlayfs.rst."""
        name = path.translate(str.maketrans({"%": "%25", "/": "%2F", ",": "%2C", "\\": "%5C"}))
        layers = [f"{at(self.layer)}/upper{name}", *[f"{at(fd)}/." for fd in lowers]]
        upper, work = self.make_below(layers), self.make_below([f"{at(self.layer)}/work{name}"])
        if not path:
            self.fill_layer(layers)
        data = f"xino=on,lowerdir={':'.join(map(at, lowers))},upperdir={upper},workdir={work}"
        data += ",userxattr" * self.options.rootless  # it marks files by xattrs; trusted.* needs root outside
        mount("overlay", target, self.nodev, data, "a writable layer over what is never changed")
        return True

    def fill_layer(self, layers):
        """Put the container's own /etc/hosts, hostname and resolv.conf into the layer, before it is one.

        There they replace what the image has, even a link to nowhere; where that cannot be, it stays."""
        options = self.options
        etc = self.make_below(layers, "/etc")
        texts = {"hostname": options.hostname + "\n", "resolv.conf": "",
                 "hosts": f"127.0.0.1\tlocalhost {options.hostname}\n::1\tlocalhost\n"}
        for name, text in texts.items() if etc else ():
            why = f"the container's own /etc/{name}"
            if options.network == "host":
                text = attempt(read_file, f"/etc/{name}", "the host's, as is the network") or ""
            if name == "hosts":
                text += "".join(options.add_host)
            place = f"{etc}/{name}"
            if options.upperdir:
                attempt(call, "unlink", place, why="what an earlier run has put there")
            fd = attempt(call, "open", place, "O_WRONLY|O_CREAT|O_EXCL", 0o644, why=why, only="EEXIST")
            if fd:  # else it is a directory of the user's
                call("write", fd, os.fsencode(text), why=why)
                os.close(fd)
        # in a directory whose owner does not exist in our user namespace, overlay lets nobody make anything
        for target in [*options.targets, options.workdir or "/"] if options.rootless else ():
            self.make_below(layers, os.path.dirname(target))

    def make_below(self, layers, path=""):
        """Make a directory in the layer, layers[0], like the next that has it; return where, or ""."""
        place = layers[0] + path
        statuses = [attempt(os.lstat, layer + path) for layer in layers]
        below = next(filter(None, statuses), None)
        if below and not stat.S_ISDIR(below.st_mode) or (
                path and not self.make_below(layers, path.rpartition("/")[0])):
            return ""  # something else is in the way; a link could lead out
        if not statuses[0]:
            call("mkdir", place, 0o755, why="a directory of the layer")
            if below:  # the merged directory has the owner and the mode of the topmost
                if not self.options.rootless:
                    call("chown", place, below.st_uid, below.st_gid, why="as the one below")
                call("chmod", place, below.st_mode, why="as the one below")
        return place

    def mount_own(self):
        """Mount what is the container's own; the kernel wants to see the host's /proc and /sys for that."""
        options = self.options
        for row in self.own_mounts.format(
                inert=INERT, frozen="0" if options.privileged else "MS_RDONLY", nodev=self.nodev,
                tty="" if options.rootless else ",gid=5", size=options.shm_size).split("\n"):
            point, fstype, flags, data, why = row.split(" ", 4)
            place = open_inside(point, "its place in the rootfs", "mkdir", self.top)
            # only the owner of a network namespace may mount its sysfs
            if fstype == "sysfs" and options.rootless and options.network == "host":
                attach(clone_tree(point, why, "MOUNT_ATTR_RDONLY"), place, why)
            else:
                mount(fstype, at(place), flags, data.strip("-"), why)

    def make_devices(self):
        """Fill /dev with what all have and --device asks for, while the host's devices are in reach.

        As root a node is our own, on a tmpfs that may have some: chmod and chown inside do not reach the
        host's. Without root none can be made; there the host's belong to somebody else."""
        for target, path in [*zip(DEVICES, DEVICES), *self.options.device]:
            why, status, is_own = f"the device {path}", os.stat(path), target == path in DEVICES
            if not status.st_rdev:
                raise Failure(f"--device {path}: it is no device")
            if not self.options.rootless:
                mode = status.st_mode | (0o666 if path in DEVICES else 0)
                path = f"{at(self.tmpfs)}/{path.replace('/', '%')}"
                attempt(call, "mknod", path, mode, status.st_rdev, why="a node of its own", only="EEXIST")
                call("chown", path, status.st_uid, status.st_gid, why="as the host's")
            clone = clone_tree(path, why)
            if is_own:
                attach(clone, open_inside(target, why, "mknod", self.top), why)
            else:
                self.mounts.append((why, target, "mknod", clone, None))
        for name, text in DEVICE_LINKS.items():
            call("symlink", text, f"{at(self.top)}/dev/{name}", why="programs expect it")

    def mask(self):
        """Hide what tells of the host, freeze what would change the one kernel that all share."""
        if self.options.privileged:
            return
        throttles = [f"/sys/devices/system/cpu/{name}/thermal_throttle"
                     for name in os.listdir("/sys/devices/system/cpu")]
        for path in filter(exists, MASKED_PATHS + READ_ONLY_PATHS + throttles):
            why = f"hide or freeze {path}"
            place = open_path(path, why)
            if path in READ_ONLY_PATHS:
                attach(clone_tree(path, why, "MOUNT_ATTR_RDONLY|MOUNT_ATTR_NOSUID|MOUNT_ATTR_NODEV|"
                                  "MOUNT_ATTR_NOEXEC"), place, why)
            else:
                hide(place, why)

    def furnish(self):
        """Mount what --tmpfs, --volume, --device ask for, parents first. The terminal is open by now."""
        for why, target, create, source, data in sorted(self.mounts, key=lambda row: row[1].count("/")):
            # a tmpfs has the mode of what it covers; where nothing is, that of /tmp
            status = data is not None and attempt(os.stat, target, only="ENOENT ENOTDIR ELOOP EACCES")
            place = open_inside(target, why, create)  # makes what is missing; other errors end it here
            where = os.readlink(at(place))  # the kernel's word: every link resolved
            # what we read in /proc must come from the kernel, and init mounts the cgroups later
            if where == "/" or is_below(where, ("/proc", "/sys/fs/cgroup")):
                raise Failure(f"{why}: in the container that is {where}, which is no place for it: refused")
            if data is None:
                attach(source, place, why)
            else:
                data = f"mode={status.st_mode & 0o7777 if status else 0o1777:o},{data}"
                mount("tmpfs", at(place), f"{source}|{self.nodev}", data, why)


def place_cgroups(cgroups):
    """Open the place of each cgroup: init mounts them when it has joined; volumes may be on /sys by then."""
    top = "/sys/fs/cgroup"
    if not (cgroups or exists(top)):  # the kernel has none
        return
    alone = [cgroup.is_v2 for cgroup in cgroups] == [True]  # it is shown at the top itself
    if not alone:  # also where there is none: that hides the host's, which --network host shows
        mount("tmpfs", top, INERT, "mode=755,size=64k", "a place for each hierarchy")
    for cgroup in cgroups:
        names = cgroup.controllers or "unified" * (not alone)
        cgroup.place = open_inside(f"{top}/{names}", "where the cgroups go", "mkdir")
        for name in {*names.split(",")} - {names}:
            call("symlink", names, f"{top}/{name}", why="as on the host")
    if not alone:
        set_attributes(open_path(top, "where they are"), "MOUNT_ATTR_RDONLY", "it is complete")

def open_path(path, why, flags=""):
    """Return an O_PATH descriptor: it names the place from now on, whatever becomes of the name."""
    return call("open", path, flags + "O_PATH|O_CLOEXEC", why=why)

def clone_tree(path, why, flags="", recursive="AT_RECURSIVE"):
    """Return a copy of the mount at `path`, with all below; attached nowhere yet. See open_tree(2)."""
    fd = call("open_tree", "AT_FDCWD", path, f"OPEN_TREE_CLONE|OPEN_TREE_CLOEXEC|{recursive}", why=why)
    if flags:
        set_attributes(fd, flags, why, recursive)
    return fd

def set_attributes(fd, flags, why, recursive="0"):
    """Add flags to the mount behind `fd`, and to all below it if recursive. See mount_setattr(2)."""
    attributes = struct.pack("4Q", value_of(flags), 0, 0, 0)  # set, clear, propagation, userns
    call("mount_setattr", fd, "", f"AT_EMPTY_PATH|{recursive}", attributes, 32, why=f"{why} ({flags})")

def attach(clone, place, why):
    """Attach what clone_tree() returned to what `place` refers to; close both. See move_mount(2)."""
    call("move_mount", clone, "", place, "", "MOVE_MOUNT_F_EMPTY_PATH|MOVE_MOUNT_T_EMPTY_PATH", why=why)
    os.close(clone)
    os.close(place)

def hide(place, why):
    """Cover a directory with an empty one, anything else with the null device."""
    if os.path.isdir(place):
        mount("tmpfs", at(place), f"MS_RDONLY|{INERT}", "size=4k", why)
        os.close(place)
    else:
        attach(clone_tree("/dev/null", why), place, why)

def open_inside(path, why, create="", root="AT_FDCWD"):
    """Return an O_PATH descriptor for `path`, every symlink resolved inside the root, or refused.

    `create` is the call that makes it if it is missing: mkdir, or for a file mknod.
    The root is where we stand, "/" until enter_workdir(); a magic link (/proc/self/root, an open descriptor)
    is refused: no volume leads a mount out. Or it is `root`, for paths without links. See openat2(2)."""
    refused = "RESOLVE_NO_MAGICLINKS" if root == "AT_FDCWD" else "RESOLVE_NO_SYMLINKS"
    how = struct.pack("3Q", value_of("O_PATH|O_CLOEXEC"), 0, value_of(f"RESOLVE_IN_ROOT|{refused}"))
    place = f"{why}: {path} in the container"
    try:
        return call("openat2", root, path, how, 24, why=place)
    except FileNotFoundError:
        if not create:
            raise
    above, name = os.path.split(path.rstrip("/"))
    fd = open_inside(above, why, "mkdir", root)
    missing = f"{at(fd)}/{name}"
    link = attempt(os.readlink, missing)  # one that leads to what is missing
    if not link:
        call(create, missing, 0o755 if create == "mkdir" else 0o644, why=place)
    os.close(fd)
    return open_inside(os.path.join(above, link or name), why, create, root)

def exists(path):
    """Tell whether `path` exists. os.path.exists() says no to every error: a path to hide would stay."""
    return bool(attempt(os.stat, path, only="ENOENT ENOTDIR"))

def read_mountinfo():
    """Yield (id, device, root, mount point, type, its options) of each mount. See proc_pid_mountinfo(5)."""
    for line in read_file("/proc/self/mountinfo", "read the table of mounts").rstrip("\n").split("\n"):
        number, _, device, *paths = line.split(" ")
        root, point = (os.fsdecode(os.fsencode(path).decode("unicode_escape").encode("latin-1"))
                       for path in paths[:2])  # \040 is a space
        fstype, _, words = paths[paths.index("-") + 1 :][:3]
        yield number, device, root, point, fstype, words

def mount_id(fd):
    """Return the number that mountinfo gives the mount that `fd` is in. See proc_pid_fdinfo(5)."""
    # pos: 0 flags: 012000000 mnt_id: 29
    return read_file(f"/proc/self/fdinfo/{fd}", "which mount is this").split()[5]

def is_below(path, places):
    """Tell whether `path` is one of `places` or somewhere below one."""
    return any((path + "/").startswith(place + "/") for place in places)


# ---- Isolation, what it may ask for: seccomp_filter, drop_privileges -----------------------------

# What the container's root keeps: Docker's 14. MKNOD is harmless: where a node can be made all is nodev.
DEFAULT_CAPABILITIES = """CHOWN DAC_OVERRIDE FSETID FOWNER MKNOD NET_RAW SETGID SETUID SETFCAP SETPCAP
    NET_BIND_SERVICE SYS_CHROOT KILL AUDIT_WRITE""".split()
CAPABILITY_NAMES = CAPABILITIES + ["NEWER"] * 23  # one for each of 64 bits

# Docker's default profile turned around: what that refuses, name:x86_64:generic (999: there is none; aarch64,
# riscv64 and loongarch64 share one table). With any of the capabilities in the key it allows them. Some are
# judged by the low 32 bits of an argument, as by the kernel: after the numbers its offset in struct
# seccomp_data, and what is refused, a value or any of these bits. clone: all CLONE_NEW*, as root has powers
# in a user namespace of its own; socket: AF_ALG, AF_VSOCK, which no namespace divides; personality: all but
# the question which it is, PER_LINUX, PER_LINUX32, UNAME26; ioctl: TIOCSTI, TIOCLINUX, that type on terminals
REFUSED_CALLS = {
    "SYS_ADMIN BPF": "bpf:321:280",
    "SYS_ADMIN PERFMON": "perf_event_open:298:241",
    "SYS_ADMIN SYSLOG": "syslog:103:116",
    "SYS_ADMIN": """mount:165:40 umount2:166:39 sethostname:170:161 setdomainname:171:162 quotactl:179:60
        lookup_dcookie:212:18 unshare:272:97 fanotify_init:300:262 setns:308:268 open_tree:428:428
        move_mount:429:429 fsopen:430:430 fsconfig:431:431 fsmount:432:432 fspick:433:433 clone3:435:435
        mount_setattr:442:442 quotactl_fd:443:443 lsm_get_self_attr:459:459 lsm_set_self_attr:460:460
        lsm_list_modules:461:461 open_tree_attr:467:467 listns:470:470 clone:56:220:16:any_bit:0x7E020000""",
    "SYS_BOOT": "reboot:169:142",
    "SYS_MODULE": "init_module:175:105 delete_module:176:106 finit_module:313:273",
    "SYS_NICE": "mbind:237:235 set_mempolicy:238:237 get_mempolicy:239:236 set_mempolicy_home_node:450:450",
    "SYS_PACCT": "acct:163:89",
    "SYS_PTRACE": "kcmp:312:272 pidfd_getfd:438:438 process_madvise:440:440",
    "SYS_RAWIO": "iopl:172:999 ioperm:173:999",
    "SYS_TIME": "settimeofday:164:170 clock_settime:227:112",
    "SYS_TTY_CONFIG": "vhangup:153:58",
    "DAC_READ_SEARCH": "open_by_handle_at:304:265",
    "": """uselib:134:999 ustat:136:999 sysfs:139:999 pivot_root:155:41 _sysctl:156:999 swapon:167:224
        swapoff:168:225 kexec_load:246:104 add_key:248:217 request_key:249:218 keyctl:250:219
        migrate_pages:256:238 move_pages:279:239 kexec_file_load:320:294 userfaultfd:323:282
        io_uring_setup:425:425 io_uring_enter:426:426 io_uring_register:427:427 socket:41:198:16:equal:38
        socket:41:198:16:equal:40 question:135:92:16:equal:0xFFFFFFFF
        personality:135:92:16:any_bit:0xFFFDFFF7 ioctl:16:29:24:equal:0x5412 ioctl:16:29:24:equal:0x541C""",
}
LAST_CALL = 471  # the newest that was looked at, in Linux 7.2: one that is to be let through raises it


def seccomp_filter(kept):
    """Return the program that the kernel runs at every system call of the container. See seccomp(2).

    Classic BPF, <linux/bpf_common.h>, over struct seccomp_data: the number at offset 0, the architecture at
    4, six 64-bit arguments from 16. A step is what to do, how far to jump from the next step if true, if
    false, and with which value. Calls that take a capability in `kept` are let through."""
    # BPF_LD|BPF_W|BPF_ABS, BPF_JMP|BPF_K and JEQ, JGE, JSET; BPF_RET and SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO
    words = {"load": 0x20, "equal": 0x15, "at_least": 0x35, "any_bit": 0x45, "return": 0x06,
             "ALLOW": 0x7FFF0000, "EPERM": 0x50001, "ENOSYS": 0x50026}
    # clone3 has its flags behind a pointer, which a filter cannot follow; on ENOSYS libc falls back to clone
    others = {"clone3": "return 0 0 ENOSYS", "question": "return 0 0 ALLOW"}
    # ENOSYS, for which libc has another way, is the answer to other architectures, and to what nobody has
    # looked at here yet: above LAST_CALL (x32's numbers too, which have bit 30 set), and in the gap before
    # 424, from where on all machines share one numbering, as the kernel has begun to fill it
    program = [f"""load 0 0 4  equal 0 4 {ARCHITECTURE}
                   load 0 0 0  at_least 2 0 {LAST_CALL + 1}  at_least 0 2 {295 if COLUMN else 336}
                   at_least 1 0 424  return 0 0 ENOSYS"""]
    for capabilities, calls in REFUSED_CALLS.items():
        for row in calls.split() if kept.isdisjoint(capabilities.split()) else ():
            name, *numbers = row.split(":")
            steps = [others.get(name, "return 0 0 EPERM")]
            if numbers[2:]:
                offset, test, value = numbers[2:]
                steps = [f"load 0 0 {offset}", f"{test} 0 1 {value}", *steps, "load 0 0 0"]
            program += [f"equal 0 {len(steps)} {numbers[COLUMN]}", *steps]
    text = " ".join([*program, "return 0 0 ALLOW"])
    values = [words.get(word) or int(word, 0) for word in text.split()]
    return struct.pack("HBBI" * (len(values) // 4), *values)  # struct sock_filter

def read_inside(path):
    """Return the rows of a file like /etc/passwd inside, each of 6 fields or more; [] if it is not there."""
    fd = attempt(open_inside, path, "look up the user", only="ENOENT ENOTDIR")
    if not fd:
        return []
    status = os.fstat(fd)
    # to open a FIFO would be to wait for its writer, to read /proc/kmsg for the next message
    if (not stat.S_ISREG(status.st_mode) or status.st_size > 64 << 20
            or is_below(os.readlink(at(fd)), ("/proc", "/sys"))):
        raise Failure(f"{path} in the container is not a regular file of at most 64 MiB")
    return [f"{line}:::::".split(":") for line in read_file(at(fd), f"look up the user in {path}").split("\n")
            if "\0" not in line]

def look_up(word, rows):
    """Return the row of this name, or this number, which is never a name; or one made up: group 0, home /."""
    column = 2 if word.isdecimal() else 0
    return next((row for row in rows if row[column] == word), [None, "", word, "0", "", "/"])

def find_user(options):
    """Return (uid, gid, groups, home) for --user, by the container's own files. See passwd(5), group(5)."""
    asked = f"--user {options.user or 0}"
    user, _, group = options.user.partition(":")
    name, _, user, gid, _, home, *_ = look_up(user or "0", read_inside("/etc/passwd"))
    table = read_inside("/etc/group")
    numbers = [user, *[look_up(word, table)[2] for word in (group or gid or "0", *options.group_add)],
               *[row[2] for row in table if name and not group and name in row[3].split(",")]]
    ids = []
    for number in numbers:
        try:
            ids.append(parse_number(number, 0, 0xFFFFFFFE))
        except ValueError:
            raise Failure(f"{asked}: no such {'group' if ids else 'user'} in its /etc: {number!r}") from None
    groups = sorted(set(ids[1:]))
    if len(groups) > 65536:  # NGROUPS_MAX of <linux/limits.h>
        raise Failure(f"{asked}: in more than 65536 groups of the container's /etc")
    if options.rootless and any(ids[:2]):
        raise Failure(f"{asked}: without root there is but one user inside: 0, the caller",
                      "with sudo there are all")
    return *ids[:2], groups, home or "/"

def drop_privileges(options, uid, gid, groups):
    """Give up, for good, what the command is not to have. Runs in init, last before execve.

    Without no_new_privs the kernel takes a filter only from CAP_SYS_ADMIN; limits, groups and the bounding
    set need what a change of user takes away. See credentials(7), capabilities(7)."""
    kept = set(CAPABILITY_NAMES if options.privileged or "ALL" in options.cap_add else DEFAULT_CAPABILITIES)
    if "ALL" in options.cap_drop:
        kept = set()
    kept = kept.union(options.cap_add).difference(options.cap_drop)
    if options.oom_score_adj is not None:  # while we may: to lower it takes CAP_SYS_RESOURCE
        write_file("/proc/self/oom_score_adj", str(options.oom_score_adj), "set --oom-score-adj")
    for name, limit in options.ulimit:
        call("setrlimit", RESOURCES.index(name), limit, why=f"--ulimit {name}")
    if options.process_limit:  # refused where the caller's own is lower already
        attempt(call, "setrlimit", "RLIMIT_NPROC", options.process_limit, why="there is no cgroup for it")
    if not options.privileged and "seccomp=unconfined" not in options.security_opt:
        program = ctypes.create_string_buffer(seccomp_filter(kept))
        # struct sock_fprog: how many steps, where they are
        fprog = struct.pack("HP", len(program) // 8, ctypes.addressof(program))
        call("prctl", "PR_SET_SECCOMP", "SECCOMP_MODE_FILTER", fprog,
             why="from here on the kernel asks this filter at every call")
    bits = int(read_file("/proc/self/status", "the bounding set").partition("\nCapBnd:\t")[2][:16], 16)
    for bit, name in enumerate(CAPABILITY_NAMES):
        if name in kept:
            if name in options.cap_add and not bits >> bit & 1:
                raise Failure(f"--cap-add {name}: mydocker was started without it")
        elif bits >> bit & 1:  # execve gives root all of the bounding set, whatever capset leaves
            call("prctl", "PR_CAPBSET_DROP", bit, why=f"{name}: for nobody inside")
            bits -= 1 << bit
    if not options.rootless:  # denied there: who gives up a group may open a file that shuts it out
        call("setgroups", groups, why="its groups, none of the caller's")
    call("setresgid", gid, gid, gid, why="its group")
    call("setresuid", uid, uid, uid, why="its user")
    # _LINUX_CAPABILITY_VERSION_3, this thread; effective, permitted, inheritable, of 32 bits and then of 32
    # more. Inheritable and, with it, ambient are emptied: through them the caller's would survive execve
    high, low = divmod(0 if uid else bits, 1 << 32)
    call("capset", struct.pack("Ii", 0x20080522, 0), struct.pack("6I", low, low, 0, high, high, 0),
         why="keep these capabilities and no others")
    call("prctl", "PR_SET_PDEATHSIG", "SIGKILL", why="again: the change of user took that back")
    if not options.privileged and "no-new-privileges=false" not in options.security_opt:
        call("prctl", "PR_SET_NO_NEW_PRIVS", 1, 0, 0, 0, why="setuid programs give nothing more")


# ---- Inside, the rest of init: attach_stdio, find_command, execute -------------------------------

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def leave_behind(uid, *kept):
    """Let go of root's keys, and of all descriptors but `kept` and 0 to 2; those three become the user's.

    Close-on-exec would be too late: while execve looks up the command, its #! interpreter and its loader, a
    symlink to /proc/self/fd/N could lead through a directory of the host that is open (CVE-2024-21626)."""
    # a kernel built without keys, which has none to leak, says ENOSYS
    attempt(call, "keyctl", "KEYCTL_JOIN_SESSION_KEYRING", None, why="not the keyring of root", only="ENOSYS")
    for fd in range(3) if uid else ():
        # pipes without a name: a FIFO of the host's stays as it is
        if os.isatty(fd) or os.readlink(at(fd)).startswith("pipe:"):
            call("fchown", fd, uid, -1, why="it is its user's")
    first = 3
    for fd in sorted([*kept, 1 << 30]):
        if first < fd:
            call("close_range", first, fd - 1, 0, why="nothing of ours or of the caller's is open inside")
        first = fd + 1

def set_up_network(options):
    """Bring up lo, all that a new network namespace has; let everybody have port 80, ping. netdevice(7)."""
    call("ioctl", call("socket", "AF_UNIX", "SOCK_DGRAM|SOCK_CLOEXEC", 0, why="any socket will do for that"),
         "SIOCSIFFLAGS", struct.pack("16sH14x", b"lo", 1), why="bring up lo")  # struct ifreq: IFF_UP
    attempt(write_file, "/proc/sys/net/ipv4/ip_unprivileged_port_start", "0", "nobody is in the way there")
    attempt(write_file, "/proc/sys/net/ipv4/ping_group_range", "0 0" if options.rootless else "0 2147483647",
            "nobody is hurt by an echo; in a user namespace there is but one group")

def join_cgroups(options, cgroups):
    """Enter the cgroups, then see them as the root of all cgroups. See cgroup_namespaces(7).

    Late, so that this interpreter is not charged and small limits work; before the command's first
    instruction, so that no child of it can be outside."""
    for cgroup in cgroups:
        why = f'join the cgroup, "0" is the one who writes ({cgroup.directory})'
        try:
            call("write", *cgroup.joins.pop(0), why=why)
        except OSError as error:  # v1's cpu lets no real-time caller in; that matters to who asked for it
            if options.asked & {*cgroup.limits} or cgroup.is_v2 or error.errno != errno.EINVAL:
                raise
    call("unshare", "CLONE_NEWCGROUP", why="the root of a cgroup namespace is the cgroup it is made in")
    for cgroup in cgroups:
        for join in cgroup.joins:  # --privileged on v2: that root is to be divided further
            call("write", *join, why=f"go below, and hand the controllers down ({cgroup.directory})")
        mount("cgroup" if cgroup.controllers else "cgroup2", at(cgroup.place),
              INERT if options.privileged else f"MS_RDONLY|{INERT}", cgroup.controllers, "its own alone")

def attach_stdio(options, stdio):
    """Give the command 0 to 2: a terminal of its own, pipes to run(), or the caller's files."""
    if options.tty:
        try:
            fd = call("open", "/dev/pts/0", "O_RDWR|O_NOCTTY|O_CLOEXEC", why="run() holds its other end")
        except FileNotFoundError:  # the master is closed: run() has died, and this process is about to
            raise BrokenPipeError from None
        call("ioctl", fd, "TIOCSCTTY", 0, why="the controlling terminal: Ctrl-C, job control")
        attach(clone_tree("/dev/pts/0", "the same terminal"),
               open_inside("/dev/console", "where it goes", "mknod"), "its terminal by another name")
        stdio = dict.fromkeys(range(3), fd)
    elif not options.interactive:
        stdio[0] = call("open", "/dev/null", "O_RDONLY|O_CLOEXEC", why="without -i there is no stdin")
    for target, fd in stdio.items():
        call("dup2", fd, target, why="stdin, stdout, stderr")

def enter_workdir(options):
    """Stand where the command is to start: --workdir, or in host view the caller's directory."""
    chosen = options.workdir or ("/" if options.rootfs else "")
    # there other files have the same names
    hidden = is_below(options.cwd, PRIVATE_PATHS + (("/tmp",) if options.rootless else ()))
    path = chosen or ("" if hidden else options.cwd)
    try:
        call("fchdir", open_inside(path, "--workdir", "mkdir" if chosen else ""), why=f"start in {path}")
    except OSError:
        if chosen:
            raise
        log.warning(f"the current directory {options.cwd or '(deleted)'} is not visible inside: "
                    "starting in /")

def environment(options, home):
    """Return the command's environment: these and what --env names, nothing else of the caller's."""
    env = {"PATH": DEFAULT_PATH, "HOSTNAME": options.hostname, "TERM": "xterm" if options.tty else None}
    for text in sum(options.env_file, []) + options.env:
        name, equals, value = text.partition("=")
        env[name] = value if equals else os.environ.get(name)
    env["HOME"] = env.get("HOME") or home
    return dict(row for row in env.items() if None not in row)  # None: by its name alone, and not there

def find_command(command, path):
    """Return {where `command` may be: its interpreter}, in each directory of `path` unless it has a slash."""
    # as root: the kernel reads the #! of a script that the command's user may not read
    places = [f"{place or '.'}/{command}" for place in path.split(":") if command]
    return {place: follow_interpreters(place) for place in ([command] if "/" in command else places)}

def is_own_python(path):
    """Tell whether `path` is the program of this process: the same file, in no copy of the mount."""
    return os.path.samefile(path, "/proc/self/exe") and mount_id(open_path(path, "is it this program")) == (
        mount_id(open_path("/proc/self/exe", "is it this program")))

def follow_interpreters(command):
    """Return the last program to which the #! of `command` leads, as the kernel reads it. See execve(2).

    Refuse the host's Python, which /proc/self/exe is until execve: started with the image's loader, which
    opens /proc/self/exe again, it would be overwritten when run() is gone (CVE-2019-5736). What is exchanged
    after this look run() sees, which stops the new program at its first instruction: Container.reap()."""
    path = command
    try:
        for _ in range(6):  # the kernel follows no more
            if is_own_python(path):
                raise Failure(f"{command}: leads to the program that runs mydocker: refused", "",
                              EXIT_NOT_EXECUTABLE)
            # nothing but what can be executed is read: /proc/kmsg, a regular file, would lose its messages
            if not (os.path.isfile(path) and os.access(path, os.X_OK)):
                break
            with open(path, "rb", 0) as file:
                head = file.read(256)
            if head[:2] != b"#!":
                break
            # after spaces and tabs a word up to one of these, which are fewer than those of bytes.split()
            ends = bytes.maketrans(b" \t\n", b"\0\0\0")
            path = os.fsdecode(head[2:].lstrip(b" \t").translate(ends).partition(b"\0")[0])
    except OSError:
        pass  # what is not there, or cannot be read, leads nowhere
    return path

def execute(options, argv, places, env, caller_mask):
    """Become the command, in one of `places`. Raises Failure when it cannot. See execve(2)."""
    # by hand, not by os.execvp: that imports a module when it searches, and Python is out of reach now
    # Ignored signals stay so through execve: that is for HUP alone, in case the caller is nohup. SIG_DFL, 0,
    # is not set again: that would discard a pending SIGCONT. The mask is last: else Python's own handler
    # would take a pending SIGINT
    for number in filter(signal.getsignal, signal.valid_signals() - {signal.SIGHUP}):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, caller_mask)
    failure = Failure(f"{argv[0] or '(nothing)'}: command not found", "" if options.rootfs else
                      "there are no images here: --rootfs DIR names a root filesystem", EXIT_NOT_FOUND)
    for path, last in places.items():
        try:
            call("execve", path, argv, env, why="become the command, as PID 1 of the container")
        except (FileNotFoundError, NotADirectoryError):
            if os.path.isfile(path):
                raise Failure(f"{path}: its interpreter, {'the ELF loader' if last == path else last}, "
                              "is not in the container", "", EXIT_NOT_FOUND)
        except OSError as error:
            why = "it is a directory" if os.path.isdir(path) else os.strerror(error.errno)
            failure = Failure(f"{path}: cannot execute: {why}", "", EXIT_NOT_EXECUTABLE)
            if error.errno != errno.EACCES:  # a later directory of PATH may have another
                break
    raise failure


# ---- Outside, the rest of run: Terminal, Container -----------------------------------------------

def relay_terminals(options):
    """Return what the command gets in place of terminals at 0 to 2, without -t, and our ends of that.

    The caller's terminal never goes in: whoever holds one can read what is typed next, or change its mode.
    We read it in the caller's job, so that job control holds: in the background the kernel stops us."""
    stdio, ours = {}, {}
    for fd in range(3):
        if not options.tty and os.isatty(fd) and (fd or options.interactive):
            ends = call("pipe2", "O_CLOEXEC", why="in place of a terminal of the caller's")
            stdio[fd], ours[fd] = reversed(ends) if fd else ends
            os.set_blocking(ours[fd], False)
    return stdio, ours


class Terminal:
    """The outside end of the container's terminal: what is written to a pty's master is read as if typed."""

    saved = None  # the modes of the caller's terminal
    pause = 0.02  # seconds until the end of the input is typed again

    def __init__(self, pid):
        # of the container's own devpts, so that it has a name there; no code of it runs yet. See ioctl_tty(2)
        place, flags = f"/proc/{pid}/root/dev/pts", "O_RDWR|O_NOCTTY|O_NONBLOCK|O_CLOEXEC"
        self.master = call("open", f"{place}/ptmx", flags, why="the master of a new pty, in its devpts")
        call("ioctl", self.master, "TIOCSPTLCK", bytes(4), why="unlock its other end, pts/0")
        self.peer = call("open", f"{place}/0", flags, why="held: it may be closed inside, and opened again")
        self.resize()
        if not os.isatty(0):
            log.warning("stdin is not a terminal: -t gives the command one all the same")

    def set_raw(self):
        """Have the caller's terminal pass every key on: what Ctrl-C means is for the container's to say."""
        if os.isatty(0):
            self.saved = self.saved or call("tcgetattr", 0, why="to put the caller's terminal back")
            log.end = b"\r\n"  # from now on
            raw = [0, 0, self.saved[2], 0, *self.saved[4:]]  # no flag for input, output, keys
            call("tcsetattr", 0, "TCSANOW", raw, why="the caller's terminal passes on every key")

    def type_end(self):
        """Type ^D, the end of the input, once all before it is read; return the seconds until the next try.

        Earlier, a line editor that changes the terminal's mode would lose it; just then it may, too: hence
        again, at longer and longer intervals. One too many does no harm: a file, too, ends at every read."""
        if not any(call("ioctl", self.peer, "FIONREAD", bytes(4), why="has the command read it all")):
            attempt(os.write, self.master, b"\x04")
            self.pause = min(self.pause + 0.05, 5)
        return self.pause

    def resize(self):
        """Give the container's terminal the size of the caller's; the kernel sends SIGWINCH inside."""
        for fd in filter(os.isatty, (2, 1, 0)):  # the last decides
            size = call("ioctl", fd, "TIOCGWINSZ", bytes(8), why="the size of the caller's terminal")
            call("ioctl", self.master, "TIOCSWINSZ", size, why="the container's has the same")

    def restore(self):
        """Put the caller's terminal back as it was. Runs on every way out."""
        log.end = b"\n"
        if self.saved and is_foreground():  # not TCSADRAIN: it waits for a terminal that is stopped
            call("tcsetattr", 0, "TCSANOW", self.saved, why="put the caller's terminal back")


# The first of these starts --stop-timeout: requests to end, timers, limits. QUIT, USR1... are only passed on
STOPPING = "SIGTERM SIGINT SIGHUP SIGALRM SIGVTALRM SIGPROF SIGXCPU SIGIO SIGPWR".split()
# What run() leaves to the kernel; as by docker run, neither they nor SIGCHLD and SIGWINCH are forwarded
UNWATCHED = "SIGKILL SIGSTOP SIGPIPE SIGURG SIGTSTP SIGTTIN SIGTTOU".split()
# of two names, such as SIGCHLD and SIGCLD, or SIGHUP and SIG_IGN, the first
SIGNALS = {NAMES[name]: name for name in sorted(vars(signal), reverse=True) if name.startswith("SIG")}


def watch_signals():
    """Block the signals that run() cares for; return (the mask before, a descriptor to read them from).

    Blocked, none can end run() between two steps, and none is lost between fork and exec. What the
    caller ignores, as under nohup, stays ignored. See signalfd(2)."""
    # with SIGCHLD ignored there is no word of the end; SIGXFSZ is ignored by Python itself
    for name in "SIGCHLD SIGWINCH SIGXFSZ".split():
        signal.signal(NAMES[name], signal.SIG_DFL)
    watched = [number for number in signal.valid_signals() if SIGNALS.get(number) not in UNWATCHED
               and signal.getsignal(number) != signal.SIG_IGN]
    # SIGTTOU is only blocked: to put the terminal back must not stop us
    caller_mask = signal.pthread_sigmask(signal.SIG_BLOCK, [*watched, signal.SIGTTOU])
    sigset = sum(1 << number - 1 for number in watched).to_bytes(128, "little")  # bit n-1 is signal n
    return caller_mask, call("signalfd", -1, sigset, "O_CLOEXEC", why="signals as something to poll for")

def is_foreground():
    """Tell whether the terminal at stdin listens to this job; if it is not our own it has no say."""
    return attempt(os.tcgetpgrp, 0) in (None, os.getpgrp())


class Container:
    """The container as seen from outside, while it runs: supervise() is the loop that waits for everything.

    What has to wait in its midst is a task, written as a generator: start() sends the command off, a relay()
    carries what comes from one descriptor to another. A task runs until it has to wait, and yields for what:
    (descriptor, event of poll(2)). wait() waits for all of them, and for signals, at once; for whom it has
    come, resume() lets run on to the next yield. self.tasks are those that wait; one that returns is done."""

    terminal: "Terminal" = None
    wstatus = stopped_by = keys = None  # keys: the task of descriptor 0 with -ti
    deadline = next_end = math.inf  # when to kill, when to type the end of the input

    def __init__(self, options, pid, signal_fd):
        self.options, self.pid, self.signal_fd = options, pid, signal_fd
        self.tasks: "dict" = {}  # by "start", or the caller's descriptor: (task, descriptor, event)
        # At its execve init is to stop before the new program's first instruction, and reap() looks what it
        # is. Where the kernel refuses that (we are traced ourselves, yama), start() looks as soon as it can
        self.traced = attempt(call, "ptrace", "PTRACE_SEIZE", pid, 0, "PTRACE_O_TRACEEXEC", why="hold execve")

    def supervise(self, argv, command_fd, ready_fd, ours):
        """Relay signals and terminals until the command has ended; return its wait status."""
        self.resume("start", self.start(argv, command_fd, ready_fd))
        for number, fd in ours.items():
            self.resume(number, self.relay(number, fd))
        while self.wstatus is None:
            now = time.monotonic()
            if now >= self.deadline:
                self.kill(f"{self.stopped_by} did not end it within {self.options.stop_timeout:g} s: killed")
            if now >= self.next_end:
                self.next_end = now + self.terminal.type_end()
            self.wait(min(self.deadline, self.next_end))
        self.tasks.pop(0, None)
        # what it wrote last: all of it, unless nobody reads it after a stop or a signal
        while self.tasks and self.wait(time.monotonic() + 1 if self.stopped_by else math.inf):
            pass
        return self.wstatus

    def wait(self, deadline):
        """Wait for a signal or what a task waits for, and act on it; tell whether one came in time."""
        interests = {fd: event for _, fd, event in self.tasks.values()}
        if self.wstatus is not None and select.POLLOUT not in interests.values():
            deadline = 0  # it has ended: what there is to read is there now
        interests[self.signal_fd] = select.POLLIN
        ready = poll(interests, deadline - time.monotonic())
        if self.signal_fd in ready:
            self.take_signal(os.read(self.signal_fd, 128)[0])  # what struct signalfd_siginfo begins with
        for name, (task, fd, _) in list(self.tasks.items()):
            if fd in ready:
                self.resume(name, task)
        return bool(ready)

    def resume(self, name, task):
        """Let a task run until it waits for something, or is done."""
        self.tasks.pop(name, None)
        for wait in task:
            self.tasks[name] = task, *wait
            break

    def start(self, argv, command_fd, ready_fd):
        """Be the task that sends the command to init, with -t when its terminal is there."""
        data = os.fsencode("\0".join([*argv, ""]))  # a NUL after each word: spaces and quotes survive
        try:
            if self.options.tty:
                yield ready_fd, select.POLLIN
                if os.read(ready_fd, 1):
                    self.terminal = Terminal(self.pid)
                    self.resume(1, self.relay(1, self.terminal.master))
            while data:
                data = data[call("write", command_fd, data, why="send the command") :]
        except (FileNotFoundError, BrokenPipeError):
            pass  # init has failed, and has said why, or was killed
        os.close(command_fd)  # EOF says go
        yield ready_fd, select.POLLIN  # by its EOF: init has become the command, or died
        self.reap()
        if self.wstatus is None:
            if self.traced is None:
                self.refuse_python()
            if self.terminal and self.options.interactive:
                self.keys = self.relay(0, os.dup(self.terminal.master))
                self.take_keys()

    def relay(self, number, ours):
        """Be the task that carries what comes from the caller's 0 to the container, or from it to 1 or 2."""
        caller = open_unblocked(number)
        source, target = (ours, caller) if number else (caller, ours)
        held = b""
        while True:
            yield (target, select.POLLOUT) if held else (source, select.POLLIN)
            try:
                if held:
                    held = held[os.write(target, held) :]
                elif not (held := os.read(source, 4096)):  # as much as a pty gives, and a pipe takes, at once
                    break
            except BlockingIOError:
                pass
            except OSError as error:
                problem = f"{'stdout' if number else 'stdin'}: {error.strerror}"
                if held and number:  # nobody takes it: what comes is thrown away from now on, and HUP says so
                    target = os.open("/dev/null", os.O_WRONLY)
                    log.warning(problem)
                    self.take_signal(signal.SIGHUP)
                elif held or error.errno == errno.EIO:
                    break  # the command reads no more; or nobody has the other end of the pty, all is read
                elif number:
                    raise Failure(problem)
                else:
                    log.warning(problem)  # what breaks off has ended
                    break
        if number == 0:  # now the command is to read the end of its stdin, or of its terminal
            os.close(ours)
            if self.terminal:
                self.next_end = 0

    def take_keys(self):
        """Begin to relay what is typed, or wait for SIGCONT: in the background the terminal is another's."""
        if self.keys and is_foreground():
            self.terminal.set_raw()
            if 0 not in self.tasks:
                self.resume(0, self.keys)

    def refuse_python(self):
        """Kill what became the host's Python past follow_interpreters(): an exchanged file, binfmt_misc."""
        if attempt(is_own_python, f"/proc/{self.pid}/exe"):  # None: it has ended already
            self.kill("the command became the program that runs mydocker: killed")

    def take_signal(self, number):
        """Act on a signal: pass it on; the first of STOPPING starts the timeout, then TERM or INT kills."""
        name = SIGNALS.get(number, number)
        if name == "SIGCHLD":
            self.reap()
        elif name == "SIGWINCH":
            if self.terminal:
                self.terminal.resize()
        elif self.wstatus is not None:  # it has ended: no signal can reach it
            if name in STOPPING:
                self.tasks.clear()  # who asks for the end does not want its last output either
        elif name in STOPPING and "start" in self.tasks:
            self.kill(f"{name} before the command was started")
        elif name in ("SIGTERM", "SIGINT") and self.stopped_by:
            self.kill(f"{name}, the second signal: killed")
        else:
            if name == "SIGCONT":
                self.take_keys()
            call("kill", self.pid, name, why="pass the signal on")  # init blocks it: pending until its execve
            if name in STOPPING and not self.stopped_by:
                self.stopped_by, self.deadline = name, time.monotonic() + self.options.stop_timeout

    def reap(self, flags="WNOHANG"):
        """Take the wait status if the container has ended; let it go on where the tracing has stopped it."""
        while self.wstatus is None:
            pid, wstatus = call("waitpid", self.pid, flags, why="has the container ended")
            if not os.WIFSTOPPED(wstatus):
                if pid:
                    self.wstatus = wstatus
                break
            request = "PTRACE_CONT"  # by a signal: until its execve init has no handler, and PID 1 ignores it
            if wstatus >> 16 == 4:  # PTRACE_EVENT_EXEC of <linux/ptrace.h>
                self.refuse_python()
                request = "PTRACE_DETACH"
            attempt(call, "ptrace", request, self.pid, 0, 0, why="let it go on", only="ESRCH")  # killed

    def kill(self, message):
        """Kill the container, and say which step ended it: last, as stderr may be a stopped terminal."""
        call("kill", self.pid, "SIGKILL", why="with PID 1 the kernel kills all of its namespace")
        self.deadline = math.inf
        log.warning(message)

    def end(self):
        """Leave no process and no changed terminal behind, also when run() fails half-way."""
        try:
            if self.wstatus is None:
                call("kill", self.pid, "SIGKILL", why="run() has failed: no container without it")
                self.reap("0")
        finally:
            if self.terminal:
                self.terminal.restore()


def enter_user_namespace():
    """Become root of a user namespace, where root is the caller outside. See user_namespaces(7)."""
    uid, gid = os.geteuid(), os.getegid()
    call("unshare", "CLONE_NEWUSER", why="in it we have CAP_SYS_ADMIN, to make the other namespaces")
    write_file("/proc/self/setgroups", "deny", "in the user namespace, before a gid_map")
    write_file("/proc/self/gid_map", f"0 {gid} 1", "in the user namespace group 0 is the caller's")
    write_file("/proc/self/uid_map", f"0 {uid} 1", "in the user namespace user 0 is the caller")

def lock_upperdir(options):
    """Make what --upperdir needs and lock it until this process ends, however it ends. See flock(2)."""
    layer, why = f"{options.upperdir}/layer", f"--upperdir {options.upperdir}"
    call("makedirs", layer, 0o700, True, why=why)  # True: it may exist, or be made by another run just now
    fd = call("open", layer, "O_RDONLY|O_DIRECTORY|O_NOFOLLOW|O_CLOEXEC", why=why)
    status = os.fstat(fd)
    if status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise Failure(f"{why}: {layer} is open to others, who could use its setuid programs: refused")
    call("flock", fd, "LOCK_EX|LOCK_NB", why=why)
    options.layer_lock = fd

def write_pidfile(path, pid, undo):
    """Write the host's pid of PID 1 to a file that is locked, and so ours, until its removal at the end."""
    directory, name = os.path.split(path)
    why = f"--pidfile {path}"
    # by a descriptor of its directory: what others make of the path meanwhile does not matter
    place = f"{at(open_path(directory or '.', why, 'O_DIRECTORY|'))}/{name}"
    fd = call("open", place, "O_RDWR|O_CREAT|O_APPEND|O_NOFOLLOW|O_NONBLOCK|O_NOCTTY", 0o644, why=why)
    status = os.fstat(fd)
    if (not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_nlink != 1
            or os.read(fd, 32).strip(b"0123456789\n")):
        raise Failure(f"{why}: it exists, and is not an old pidfile of the caller's own: not replaced")
    call("flock", fd, "LOCK_EX|LOCK_NB", why=why)
    undo.append(lambda: call("unlink", place, why="the --pidfile of a container that is gone"))
    call("ftruncate", fd, 0, why=why)
    call("write", fd, b"%d\n" % pid, why=why)


# ---- The rest: print_help, main_after_script -----------------------------------------------------

def print_help():
    """Describe the command line. argparse is imported here only: nothing else needs it."""
    import argparse
    parser = argparse.ArgumentParser(
        usage=f"{USAGE}, or mydocker.py --version", conflict_handler="resolve",  # -h is --hostname
        description="Run COMMAND in a new container; the first word that is no option begins it.",
        epilog="Exit status: the command's; 125 when mydocker failed, 126 when it cannot be executed, "
               "127 when it is not found, 128+n when signal n killed it.")
    for option in TABLE:
        parser.add_argument(*option.names, help=option.text.replace("%", "%%"), metavar=option.metavar,
                            action=argparse.Action, nargs=None if option.metavar else 0)
    print(parser.format_help(), end="", flush=True)  # parser.print_help() would lose an error of stdout

def main_after_script(*_):
    """Be the program as sys.excepthook, which Python calls when the script has been left."""
    if hasattr(_libc, "malloc_trim"):  # glibc: give freed memory back to the kernel
        _libc.malloc_trim(0)
    os._exit(main(sys.argv[1:]))  # all is flushed: to take the interpreter apart in order costs 2 ms


if __name__ == "__main__":
    # Left by an exception: for as long as a script runs Python keeps its syntax tree, 4 MiB
    sys.excepthook = main_after_script
    raise SystemError("this is no error: main_after_script() goes on")
