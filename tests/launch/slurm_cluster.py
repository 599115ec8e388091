"""A Slurm cluster on one machine: Slurm's own daemons, each node in a network and host-name namespace of its own.

    python tests/launch/slurm_cluster.py up DIR [NODES]      prints how to talk to it
    python tests/launch/slurm_cluster.py down DIR

All of its files are in DIR. Nodes are called TAG1, TAG2, …; they share the machine's file systems, as nodes of a real cluster
share their storage, and reach each other by addresses of their own through a bridge. Needs root and Debian's packages
slurmctld, slurmd, slurm-client, munge and iproute2. There is no cgroup, accounting or systemd.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "scontrol", "munged", "ip", "nsenter", "unshare")
CPUS = 2


def missing() -> str | None:
    """Why a cluster cannot be started here, or None."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    absent = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if absent:
        return f"not installed: {', '.join(absent)} (Debian: slurmctld slurmd slurm-client munge iproute2)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    probe = f"kvp{secrets.token_hex(2)}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if made.returncode:
        return f"network namespaces are not allowed here: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", probe], check=True)
    return None


def _run(*words: object, **options) -> subprocess.CompletedProcess:
    done = subprocess.run([str(w) for w in words], capture_output=True, text=True, **options)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, words))}: {done.stderr.strip() or done.stdout.strip()}")
    return done


class SlurmCluster:
    """Nodes TAG1 … TAGn, partitions `batch` (preemptible, by requeueing, after two minutes of grace) and `urgent`.

    Args:
        folder: for everything that the cluster writes; created, and removed by `down`.
        nodes: how many.
        node_timeout: seconds after which a node that does not answer is down.
    """

    def __init__(self, folder: Path, nodes: int = 3, node_timeout: int = 10):
        self.folder = Path(folder).resolve()
        facts = self.folder / "cluster.json"
        if facts.is_file():  # one that is up
            self.tag, self.subnet, self.count, self.node_timeout = json.loads(facts.read_text())
        else:
            self.tag, self.subnet = f"kv{secrets.token_hex(2)}n", secrets.randbelow(200) + 20
            self.count, self.node_timeout = nodes, node_timeout
        self.nodes = [f"{self.tag}{n + 1}" for n in range(self.count)]
        self.bridge = f"{self.tag}br"
        self.environment = os.environ | {
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
        }

    def address(self, n: int) -> str:
        return f"10.77.{self.subnet}.{n}"

    def run(self, *words: object, check: bool = True) -> str:
        """Output of a Slurm command."""
        done = subprocess.run(
            [str(w) for w in words], env=self.environment, capture_output=True, text=True, timeout=60
        )
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(map(str, words))}: {done.stderr.strip()}")
        return done.stdout

    # --- up ---

    def up(self) -> None:
        for name in ("state", "spool", "log", "run", "munge"):
            (self.folder / name).mkdir(parents=True)
        self.folder.chmod(0o755)
        (self.folder / "cluster.json").write_text(
            json.dumps([self.tag, self.subnet, self.count, self.node_timeout])
        )
        host = socket.gethostname().split(".")[0]
        hosts = ["127.0.0.1 localhost", f"{self.address(254)} {host}"]
        hosts += [f"{self.address(n + 1)} {name}" for n, name in enumerate(self.nodes)]
        (self.folder / "hosts").write_text("\n".join(hosts) + "\n")
        (self.folder / "slurm.conf").write_text(self._configuration(host))
        _run("ip", "link", "add", self.bridge, "type", "bridge")
        _run("ip", "addr", "add", f"{self.address(254)}/24", "dev", self.bridge)
        _run("ip", "link", "set", self.bridge, "up")
        for n, name in enumerate(self.nodes):
            _run("ip", "netns", "add", name)
            _run("ip", "link", "add", f"{name}v", "type", "veth", "peer", "name", "eth0", "netns", name)
            _run("ip", "link", "set", f"{name}v", "master", self.bridge, "up")
            _run("ip", "-n", name, "addr", "add", f"{self.address(n + 1)}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _run("ip", "-n", name, "link", "set", device, "up")
        key = self.folder / "munge" / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        key.parent.chmod(0o700)
        run, log = self.folder / "run", self.folder / "log"
        _run(
            "munged", "--force", f"--key-file={key}", f"--socket={run}/munge.socket", f"--pid-file={run}/munged.pid",
            f"--log-file={log}/munged.log", f"--seed-file={key.parent}/seed", "--num-threads=2",
            env=self.environment,
        )  # fmt: skip
        _run("slurmctld", "-f", self.folder / "slurm.conf", env=self.environment, stdin=subprocess.DEVNULL)
        for name in self.nodes:
            self.start_node(name)
        self.wait_idle(*self.nodes)

    def start_node(self, name: str) -> None:
        """Start a node's slurmd in the node's namespaces."""
        (self.folder / "spool" / name).mkdir(exist_ok=True)
        # Not `ip netns exec`: it mounts /sys anew, and slurmd then looks for cgroups in it and dies.
        inside = f"hostname {name}; mount --bind {self.folder}/hosts /etc/hosts; exec slurmd -N {name} -f {self.folder}/slurm.conf"
        command = ["nsenter", f"--net=/run/netns/{name}", "unshare", "--uts", "--mount", "bash", "-c", inside]
        quiet = subprocess.DEVNULL
        subprocess.run(
            command, env=self.environment, stdin=quiet, stdout=quiet, stderr=quiet, check=True, timeout=30
        )

    def said_of(self, number: int) -> str:
        """What the controller and the nodes logged of a job."""
        lines = []
        for log in sorted(self.folder.glob("log/slurm*.log")):
            found = re.findall(
                rf"^.*(?:JobId=|[Jj]ob |\[){number}\b.*$", log.read_text(errors="replace"), re.MULTILINE
            )
            lines += [f"{log.name}: {line}" for line in found]
        return "\n".join(lines)

    def wait_idle(self, *names: str, timeout: float = 40) -> None:
        deadline = time.monotonic() + timeout
        while True:
            states = self.run("sinfo", "-h", "-N", "-p", "batch", "-o", "%N %T", check=False).splitlines()
            if {f"{name} idle" for name in names} <= {line.strip() for line in states}:
                return
            if time.monotonic() > deadline:
                raise RuntimeError(f"nodes are not idle: {states}; see {self.folder}/log")
            time.sleep(0.2)

    def _configuration(self, host: str) -> str:
        folder = self.folder
        lines = [
            "ClusterName=test",
            f"SlurmctldHost={host}({self.address(254)})",
            "SlurmUser=root",
            "SlurmdUser=root",
            "AuthType=auth/munge",
            # A requeued job waits for its old credential to expire, two minutes by default. Less than this, and a launch
            # that a busy machine delays comes too late for its own.
            f"AuthInfo=socket={folder}/run/munge.socket,cred_expire=10",
            "CredType=cred/munge",
            "SlurmctldPort=16817",
            "SlurmdPort=16818",
            f"SlurmctldPidFile={folder}/run/slurmctld.pid",
            f"SlurmdPidFile={folder}/run/slurmd.%n.pid",
            f"SlurmctldLogFile={folder}/log/slurmctld.log",
            f"SlurmdLogFile={folder}/log/slurmd.%n.log",
            f"StateSaveLocation={folder}/state",
            f"SlurmdSpoolDir={folder}/spool/%n",
            "ProctrackType=proctrack/linuxproc",
            "TaskPlugin=task/none",
            "JobAcctGatherType=jobacct_gather/none",
            "AccountingStorageType=accounting_storage/none",
            "JobCompType=jobcomp/none",
            "MpiDefault=none",
            "SwitchType=switch/none",
            "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_Core",
            "SchedulerType=sched/backfill",
            "SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1,requeue_delay=1,batch_sched_delay=0",
            "PreemptType=preempt/partition_prio",
            "PreemptMode=REQUEUE",
            "SlurmctldParameters=preempt_send_user_signal",
            "JobRequeue=1",
            "ReturnToService=2",
            "SlurmdParameters=config_overrides",
            "KillWait=5",
            "MinJobAge=300",
            "PropagateResourceLimits=NONE",
            "SlurmctldTimeout=30",
            f"SlurmdTimeout={self.node_timeout}",
        ]
        lines += [
            f"NodeName={name} NodeAddr={self.address(n + 1)} NodeHostname={name} CPUs={CPUS} RealMemory=4000 State=UNKNOWN"
            for n, name in enumerate(self.nodes)
        ]
        common = f"Nodes={','.join(self.nodes)} MaxTime=INFINITE DefaultTime=10 State=UP"
        lines += [
            f"PartitionName=batch {common} Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=120",
            f"PartitionName=urgent {common} PriorityTier=10 PreemptMode=OFF",
        ]
        return "\n".join(lines) + "\n"

    # --- accidents ---

    def lose_node(self, name: str) -> None:
        """Pull the cable, then the plug: the others hear nothing from it any more, not even that a connection closed."""
        _run("ip", "-n", name, "link", "set", "eth0", "down")
        self._kill(self.processes(name))

    def return_node(self, name: str) -> None:
        _run("ip", "-n", name, "link", "set", "eth0", "up")
        self.start_node(name)
        self.wait_idle(name)

    def processes(self, name: str) -> list[int]:
        """All processes on a node."""
        done = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True)
        return [int(pid) for pid in done.stdout.split()]

    @contextlib.contextmanager
    def without_shared_memory(self, name: str):
        """A node whose /dev/shm has one megabyte, as in a container started without more."""
        (daemon,) = [p for p in self.processes(name) if _is_daemon(p)]
        inside = ["nsenter", f"--target={daemon}", "--mount"]
        _run(*inside, "mount", "-t", "tmpfs", "-o", "size=1m", "kvcat", "/dev/shm")
        try:
            yield
        finally:
            _run(*inside, "umount", "/dev/shm")

    @contextlib.contextmanager
    def firewall(self, name: str, ports: str):
        """A node from which these ports of the others are not reached: packets vanish."""
        rule = ["ipproto", "tcp", "dport", ports, "blackhole"]
        _run("ip", "-n", name, "rule", "add", *rule)
        try:
            yield
        finally:
            _run("ip", "-n", name, "rule", "del", *rule)

    @contextlib.contextmanager
    def frozen(self):
        """Ranks of all jobs stand still inside the block: what Slurm takes its time for does not miss them."""
        ranks = [pid for name in self.nodes for pid in self.processes(name) if _is_rank(pid)]
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for pid in ranks:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            if number == signal.SIGSTOP:
                try:
                    yield
                except BaseException:
                    self._kill(ranks)
                    raise

    # --- down ---

    def down(self) -> None:
        """End all daemons, jobs and processes on the nodes, and remove namespaces, bridge and folder."""
        with contextlib.suppress(Exception):
            self.run("scancel", "--user", "root", check=False)
        for name in self.nodes:
            self._kill(self.processes(name))
        for file in (self.folder / "run").glob("*.pid"):
            with contextlib.suppress(ValueError):
                self._kill([int(file.read_text())], signal.SIGTERM)
        for name in self.nodes:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
            subprocess.run(["ip", "link", "del", f"{name}v"], capture_output=True)
        subprocess.run(["ip", "link", "del", self.bridge], capture_output=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _kill(self, pids: list[int], number: int = signal.SIGKILL) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        deadline = time.monotonic() + 15
        while pids and time.monotonic() < deadline:
            pids = [pid for pid in pids if _alive(pid)]
            time.sleep(0.05)
        if pids and number != signal.SIGKILL:
            self._kill(pids)

    def leftovers(self) -> list[str]:
        """What of this cluster is still there: processes, namespaces, links, files."""
        out = [f"folder {self.folder}"] if self.folder.exists() else []
        for kind, command in (("namespace", ["ip", "netns", "list"]), ("link", ["ip", "-o", "link"])):
            text = subprocess.run(command, capture_output=True, text=True).stdout
            out += [f"{kind}: {line}" for line in text.splitlines() if self.tag in line]
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                with contextlib.suppress(OSError):
                    text = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
                    # A process of the cluster names its folder: the daemons by their options, jobs by SLURM_CONF.
                    if _alive(int(entry.name)) and os.fsencode(f"{self.folder}/slurm.conf") in text:
                        out.append(f"process {entry.name}: {text[:80]!r}")
        return out


def _is_daemon(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip() == "slurmd"
    except OSError:
        return False


def _is_rank(pid: int) -> bool:
    """Whether a process is a rank's Python, and not one of the launcher's shells around it."""
    try:
        python = "python" in os.path.basename(os.readlink(f"/proc/{pid}/exe"))
        return python and b"\0LOCAL_RANK=" in Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def main() -> None:
    match sys.argv[1:]:
        case ["up", folder, *count]:
            if why := missing():
                sys.exit(f"no cluster: {why}")
            cluster = SlurmCluster(Path(folder), nodes=int(count[0]) if count else 3)
            cluster.up()
            print(f"export SLURM_CONF={cluster.folder}/slurm.conf  # then: sinfo")
        case ["down", folder]:
            cluster = SlurmCluster(Path(folder))
            cluster.down()
            if left := cluster.leftovers():
                sys.exit("still there: " + "; ".join(left))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
