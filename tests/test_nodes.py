"""Two machines, each with its own torchrun, as a user starts them. They are two network namespaces joined by a cable,
or two addresses of one machine where namespaces are not permitted; the disk with the run directory is shared."""

import errno
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
import torch
from conftest import apart

from sslnb import InputError, data, launch, methods, nodes, prepare, pretrain, reading

pytestmark = pytest.mark.distributed
SETTINGS = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # as the README says
started: list[subprocess.Popen] = []


@pytest.fixture(scope="module")
def machines():
    """Of a and b: the words that start a command there, and the address."""
    names = {name: f"sslnb-{name}-{os.getpid()}" for name in "ab"}
    lines = [f"netns add {name}" for name in names.values()]
    lines += [f"link add cable netns {names['a']} type veth peer name cable netns {names['b']}"]
    for i, name in enumerate(names.values(), 1):
        lines += [f"-n {name} addr add 10.77.0.{i}/24 dev cable", f"-n {name} link set cable up",
                  f"-n {name} link set lo up"]
    cable = shutil.which("ip") and all(subprocess.run(["ip", *line.split()]).returncode == 0 for line in lines)
    yield {name: (["ip", "netns", "exec", names[name]], f"10.77.0.{i}") if cable else ([], f"127.0.0.{i}")
           for i, name in enumerate("ab", 1)}
    for name in names.values() if shutil.which("ip") else ():
        subprocess.run(["ip", "netns", "del", name], stderr=subprocess.DEVNULL)


@pytest.fixture
def start(machines):
    """Start torchrun on a machine. What a test leaves behind is ended."""
    port = free_port()

    def start(name, run, processes=1, host="a", restarts=3, cwd=None):
        words, address = machines[name]
        command = [*words, sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--nproc_per_node={processes}",
                   "--rdzv_backend=c10d", f"--rdzv_endpoint={machines[host][1]}:{port}", "--rdzv_id=run",
                   f"--max_restarts={restarts}", f"--local_addr={address}",
                   # Who hosts is clear from the names of real machines; these heartbeats save the test ten seconds.
                   f"--rdzv_conf=is_host={int(name == host)},keep_alive_interval=1,keep_alive_max_attempt=5",
                   "-m", "sslnb.train", str(run)]
        prints = tempfile.TemporaryFile()  # noqa: SIM115
        started.append(subprocess.Popen(command, cwd=cwd, stdout=prints, stderr=subprocess.STDOUT,
                                        env={**os.environ, **SETTINGS}))
        started[-1].prints = prints
        return started[-1]

    yield start
    for agent in started:
        power_off(agent)
    started.clear()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def power_off(agent):
    """Of a machine nothing is left: torchrun and its processes are killed."""
    if agent.poll() is None:
        machine = [psutil.Process(agent.pid), *psutil.Process(agent.pid).children(recursive=True)]
        for process in machine:
            process.kill()
        agent.wait()


def printed(agent) -> str:
    return os.pread(agent.prints.fileno(), 10**7, 0).decode()


def end(*agents, well=True) -> str:
    """Wait for both; what they printed."""
    for agent in agents:
        assert (agent.wait(200) == 0) == well, printed(agent)
    return "".join(map(printed, agents))


def same(a, b) -> bool:
    """Whether the weights are, bit for bit."""
    left, right = a.latest()["method"], b.latest()["method"]
    return all(torch.equal(left[key], right[key]) for key in left)


# ---------------------------------------------------------------- the run


def test_two_machines_with_two_processes_each_train_the_run_of_one(start, tmp_path):
    """Small steps of SGD, as in test_distributed: big ones, or AdamW's, blow rounding up."""
    recipe = methods.recipes("simclr")["demo"].with_(epochs=1, batch=320, optimizer="sgd", lr=1e-5, warmup_epochs=0)
    alone = pretrain(recipe, out=tmp_path / "alone")
    run = prepare(recipe, out=tmp_path / "nodes", processes=4)
    said = end(*(start(name, run.path, processes=2) for name in "ab"))
    assert run.status()["state"] == "done" and said.count("step 4/4") == 1
    assert run.provenance()[0]["processes"] == 4
    curves = [[row["loss"] for row in r.history()] for r in (alone, run)]
    assert curves[0] == pytest.approx(curves[1], rel=3e-3)
    assert apart(run, alone) < 0.1


# ---------------------------------------------------------------- a machine dies


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder, images = tmp_path_factory.mktemp("data") / "pictures", data.load("digits_scattered")
    folder.mkdir()
    for i in range(64):
        images[i].save(folder / f"{i:02d}.png")
    return folder


def prepared(pictures, out):
    """MAE, because its masks are drawn from the random state; 8 steps an epoch, a checkpoint after 96 of 144."""
    return prepare(methods.recipes("mae")["demo"].with_(epochs=18, batch=8), pictures, out, processes=2, workers=0)


@pytest.fixture(scope="module")
def whole(pictures, tmp_path_factory):
    """The undisturbed run of two processes, on one machine: on two it must be the same, bit for bit."""
    run = prepared(pictures, tmp_path_factory.mktemp("whole") / "run")
    launch.torchrun(run, 2)
    return run


def saved(run, agents):
    """Wait for the first checkpoint: the run is in its middle."""
    deadline = time.monotonic() + 200
    while not run.checkpoints():
        assert time.monotonic() < deadline and all(agent.poll() is None for agent in agents), printed(agents[0])
        time.sleep(0.02)


@pytest.mark.faults
@pytest.mark.parametrize("dies, host", [("b", "a"), ("a", "b")], ids=["process 1 dies", "process 0 dies"])
def test_a_machine_that_died_comes_back_and_the_run_ends_as_if_nothing_had_happened(
        start, pictures, whole, tmp_path, dies, host):
    run = prepared(pictures, tmp_path / "run")
    agents = {name: start(name, run.path, host=host) for name in "ab"}
    saved(run, list(agents.values()))
    power_off(agents[dies])
    agents[dies] = start(dies, run.path, host=host)
    said = end(*agents.values())
    assert "Another process of this run is gone" in said, "what the other machine says"
    assert "at step 96 of 144" in said and run.status()["state"] == "done"
    assert same(run, whole)


@pytest.mark.faults
def test_without_the_machine_that_is_the_meeting_point_all_end_and_the_same_commands_continue(
        start, pictures, whole, tmp_path):
    run = prepared(pictures, tmp_path / "run")
    agents = [start(name, run.path) for name in "ab"]
    saved(run, agents)
    power_off(agents[0])
    end(agents[1], well=False)
    assert run.status()["state"] != "done"
    said = end(*(start(name, run.path) for name in "ab"))
    assert "at step 96 of 144" in said and same(run, whole)


@pytest.mark.faults
def test_processes_do_not_outlive_their_torchrun(start, pictures, tmp_path):
    run = prepared(pictures, tmp_path / "run")
    agents = [start(name, run.path) for name in "ab"]
    saved(run, agents)
    (orphan,) = psutil.Process(agents[1].pid).children()
    agents[1].kill()
    orphan.wait(60)
    deadline = time.monotonic() + 60
    while run.status()["state"] == "running":
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert run.status()["state"] == "interrupted" and run.status()["reason"] == "another process was told to stop"
    assert run.latest()["step"] > 96, "it saved first"


# ---------------------------------------------------------------- machines that differ


def test_a_machine_that_lacks_images_is_named_and_all_end(start, pictures, tmp_path, monkeypatch):
    for name in "ab":
        shutil.copytree(pictures, tmp_path / name / "pictures")
    (tmp_path / "b" / "pictures" / "07.png").unlink()
    monkeypatch.chdir(tmp_path / "a")
    run = prepared("pictures", tmp_path / "run")
    file = run.path / "recipe.json"  # both "machines" have one disk: of a relative path each finds a folder of its own
    file.write_text(file.read_text().replace(str(tmp_path / "a" / "pictures"), "pictures"))
    agents = [start(name, run.path, restarts=1, cwd=tmp_path / name) for name in "ab"]
    for agent in agents:
        said = end(agent, well=False)
        assert re.findall("pictures is 63 images, .* for process 1 on .*, but 64 images", said), said
        assert said.count("pictures is 63 images") == 1, "tried again, though nothing can change"
    assert run.status()["final"] and "63 images" in run.status()["reason"]


def test_run_directories_on_two_disks_are_noticed(start, pictures, whole, tmp_path):
    shutil.copytree(whole.path, tmp_path / "a" / "run")
    prepared(pictures, tmp_path / "b" / "run")
    said = end(*(start(name, "run", restarts=0, cwd=tmp_path / name) for name in "ab"), well=False)
    assert "its newest checkpoint is 0 for process 1 on" in said and "but 144 for process 0 on" in said


@pytest.fixture
def other(monkeypatch):
    """Give process 1, on node-b, another value of something than this process has."""
    def differ(**values):
        monkeypatch.setattr("accelerate.utils.gather_object",
                            lambda mine: [*mine, ("node-b", {**mine[0][1], **values})])
        monkeypatch.setattr(nodes, "world", lambda: (0, 2))

    return differ


@pytest.mark.parametrize("what, value", [("torch", "2.6.0"), ("the code of sslnb", "0"), ("mae", "0")])
def test_a_machine_with_other_packages_or_code_is_named(other, pictures, what, value):
    recipe = methods.recipes("mae")["demo"].with_(data=str(pictures))
    other()
    assert len(nodes.load(recipe)) == 64
    other(**{what: value})
    with pytest.raises(InputError, match=f"{what} is {value} for process 1 on node-b, but .*need the same"):
        nodes.load(recipe)


def test_images_that_one_machine_cannot_load_end_all(other):
    other(error="data set 'x' is unknown.")
    with pytest.raises(InputError, match="Process 1 on node-b: data set 'x' is unknown."):
        nodes.load(methods.recipes("mae")["demo"])


def test_restarts_over_machines_need_a_store_that_is_new_each_time(monkeypatch):
    """torchrun's own store tells a machine that comes back nothing, and all would wait for nothing."""
    for name, value in {"RUN_ID": "run", "RESTART_COUNT": "0", "MAX_RESTARTS": "3", "USE_AGENT_STORE": "True"}.items():
        monkeypatch.setenv(f"TORCHELASTIC_{name}", value)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    monkeypatch.setenv("SSLNB_PARENT", "0")
    with pytest.raises(InputError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        nodes.join()


def test_cores_are_shared_by_the_processes_of_a_machine_alone(monkeypatch):
    images = data.Images("files", "train", ["x.png"], root=Path("."))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS")
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    launch.limit_threads(32)
    assert threads == [2] and reading.loader_workers("auto", images, 32) == 3


def test_a_disk_without_locks_can_be_trained_on(pictures, tmp_path, monkeypatch, capsys):
    def flock(file, how):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", flock)
    with prepared(pictures, tmp_path / "run").lock():
        assert "has no locks (Function not implemented)" in capsys.readouterr().out
