"""Small runs for the training tests, and a program that kills, damages, resumes and shares them; not a test file
itself."""
import json
import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path

import torch

from biojepa.actions.featurizers import featurize
from biojepa.actions.vocabulary import ActionTable, Modality
from biojepa.config import ExperimentConfig, ModelConfig, StageConfig
from biojepa.data.datasets import load_dataset
from biojepa.data.download import read_card
from biojepa.data.preprocess import prepare
from biojepa.data.splits import make_split
from biojepa.training import loop
from biojepa.training.run import STAGES, run_folder, run_stages

WIDTHS = dict(protein=24, dna=20)


def alive(module, std=.1):
    """The module, with noise on parameters that begin as a constant (biases, norms, heads): there mistakes would
    not show."""
    with torch.no_grad():
        for p in module.parameters():
            if (p == p.flatten()[0]).all(): p.add_(std*torch.randn_like(p))
    return module


def small_data():
    "308 cells of 40 genes, 12 targets of which 8 are trained on; split without cell-gears."
    spec = dict(n_genes=40, n_cells=308, n_targets=12, n_modules=4, n_batches=2, control_fraction=.2)
    adata = prepare(
        load_dataset(read_card("simulated").changed(simulate=spec, cells=None, genes=None, targets=None)))
    conditions = sorted(set(adata.obs.condition) - {"ctrl"})
    split = make_split(adata,
                       "custom",
                       held_out=dict(train=conditions[:8], val=conditions[8:10], test=conditions[10:]))
    table = ActionTable.from_anndata(adata)
    sequences = dict(protein=dict(adata.uns["protein_sequences"]),
                     dna={g: s for g, s in zip(table.guide_id, table.guide_seqs) if s})
    features = [
        featurize("kmer", s, modality=Modality[m.upper()], width=WIDTHS[m], cache=False, progress=False)
        for m, s in sequences.items()
    ]
    return dict(adata=adata, split=split, features=features)


def small_experiment(epochs=(2, 8, 2, 2), batch_size=16, **model):
    "All four stages, a step of each in milliseconds."
    sizes = dict(n_genes=40,
                 d_model=8,
                 n_heads=2,
                 n_encoder_layers=1,
                 n_masked_predictor_layers=1,
                 n_predictor_layers=1,
                 d_action=12,
                 d_mode=4,
                 d_chemical=4,
                 d_protein=WIDTHS["protein"],
                 d_dna=WIDTHS["dna"])
    stages = {
        s:
        StageConfig(epochs=e,
                    batch_size=batch_size,
                    lr=1e-3,
                    **(dict(lr_composer=1e-4) if s == "dynamics" else {})) for s, e in zip(STAGES, epochs)
    }
    return ExperimentConfig(name="small", model=ModelConfig(**(sizes | model)), **stages)


OPTIONS = dict(progress=False, checkpoint_every=4, log_every=2)


def run(runs, data, trace=None, **options):
    "Run all stages; each step is noted in `trace` before it is done."
    if trace:
        descriptor, step = os.open(trace, os.O_WRONLY | os.O_APPEND | os.O_CREAT), loop.take_step
        def traced(t, batch):
            os.write(descriptor, f"{os.getpid()} {t.stage.name} {t.done}\n".encode())
            step(t, batch)
        loop.take_step = traced
    return run_stages(small_experiment(), **data, runs=runs, **(OPTIONS | options))


def in_child(function):
    "Start a process that is a copy of this one; its id."
    pid = os.fork()
    if pid: return pid
    code = 1
    torch.set_num_threads(1)    # the others were not copied
    try: function(); code = 0
    except BaseException:
        import traceback; traceback.print_exc()
    finally: sys.stdout.flush(); sys.stderr.flush(); os._exit(code)


def wait_for(happened, seconds=60):
    "Look until something is true, but not for ever."
    end = time.monotonic() + seconds
    while not (found := happened()):
        assert time.monotonic() < end, f"not in {seconds} s"
        time.sleep(.002)
    return found


def steps_of(trace):
    "Rows (process, stage, step) of a trace; an unfinished line is left out."
    if not Path(trace).is_file(): return []
    lines = Path(trace).read_text().splitlines(keepends=True)
    return [(int(p), s, int(n)) for p, s, n in (l.split() for l in lines if l.endswith("\n"))]


def newest(folder):
    "Stage and checkpoints of the stage that runs now."
    for stage in reversed(STAGES):
        if found := loop.Checkpointer(folder/stage/"checkpoints").steps(): return stage, found
    return None, []


def damage(folder, how):
    "Spoil the newest checkpoint if there is one before it; whether it was done."
    stage, steps = newest(folder)
    if len(steps) < 2: return None
    checkpoints = loop.Checkpointer(folder/stage/"checkpoints")
    tensors, text = checkpoints.path(steps[-1], ".safetensors"), checkpoints.path(steps[-1])
    if how == "byte":
        content = bytearray(tensors.read_bytes())
        content[len(content) // 2] ^= 1
        tensors.write_bytes(content)
    if how == "short": tensors.write_bytes(tensors.read_bytes()[:-100])
    if how == "json": text.write_text(text.read_text()[:-10])
    return dict(how=how, stage=stage, damaged=steps[-1], good=steps[-2])


def kill_and_resume(folder, n_kills, seed=0, damages=("byte", "short", "json"), sign=signal.SIGKILL):
    "An uninterrupted run, and one that gets a signal `n_kills` times at random moments spread over all of it."
    signal.signal(signal.SIGINT, signal.default_int_handler)    # a shell starts background jobs deaf to it
    data, rng = small_data(), random.Random(seed)
    plain_trace, trace = folder/"plain.trace", folder/"killed.trace"
    assert os.waitpid(in_child(lambda: run(folder/"plain", data, plain_trace)), 0)[1] == 0
    order = {(s, n): i for i, (_, s, n) in enumerate(steps_of(plain_trace))}  # place of a step in the whole run
    where, report, pending = run_folder(small_experiment(), folder/"killed"), [], list(damages)
    for k in range(n_kills):
        place, jitter = (k + rng.random())/n_kills*(len(order) - 1), rng.random()*.03
        pid = in_child(lambda: run(folder/"killed", data, trace))
        while True:
            mine = [(s, n) for p, s, n in steps_of(trace) if p == pid]
            if mine and order[mine[-1]] >= place: break
            assert os.waitpid(pid, os.WNOHANG) == (0, 0), "the run ended before it was killed"
            time.sleep(.001)
        time.sleep(jitter)
        os.kill(pid, sign)
        status = os.waitpid(pid, 0)[1]
        assert os.WTERMSIG(status) == sign if sign == signal.SIGKILL else os.WEXITSTATUS(status) in (0, 1)
        mine = [(s, n) for p, s, n in steps_of(trace) if p == pid]
        stage, steps = newest(where)
        spoiled = damage(
            where, pending[0]
        ) if pending and k >= n_kills*(len(damages) - len(pending) + .5)/len(damages) - 1 else None
        if spoiled: pending.pop(0)
        report.append(
            dict(pid=pid,
                 first=mine[0],
                 killed_at=mine[-1],
                 checkpoint=(stage, steps[-1] if steps else 0),
                 spoiled=spoiled))
    last = in_child(lambda: run(folder/"killed", data, trace))
    assert os.waitpid(last, 0)[1] == 0
    mine = [(s, n) for p, s, n in steps_of(trace) if p == last]
    plain = run_folder(small_experiment(), folder/"plain")
    return dict(kills=report,
                last_first=mine[0] if mine else None,
                lengths={s: 1 + max(n for t, n in order if t == s) for s in STAGES},
                executed=len(steps_of(trace)),
                needed=len(order),
                never_spoiled=pending,
                plain=str(plain),
                killed=str(where))


def killed_while_writing(folder, most):
    "Runs that are killed at a drawn fsync or rename of a file, up to the `most`-th, each from where the last was."
    data, fsync, replace, calls, rng = small_data(), os.fsync, os.replace, 0, random.Random(0)
    def deadly(function, at):
        def call(*arguments):
            nonlocal calls
            calls += 1
            if calls == at: os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments)
        return call
    def work(at):
        os.fsync, os.replace = deadly(fsync, at), deadly(replace, at)
        run(folder/"killed", data)
    kills = 0
    while (status := os.waitpid(in_child(lambda: work(rng.randint(1, most))), 0)[1]): # in the child as many are drawn
        assert os.WTERMSIG(status) == signal.SIGKILL
        kills, _ = kills + 1, rng.randint(1, most)
        assert kills < 100, f"no run comes to an end before its {most}-th write"
    assert os.waitpid(in_child(lambda: run(folder/"plain", data)), 0)[1] == 0
    plain, killed = (str(run_folder(small_experiment(), folder/name)) for name in ("plain", "killed"))
    return dict(kills=kills, plain=plain, killed=killed)


def shared_run(folder, cases):
    "Each case by one process and by two that share its batches; logs and hashes go to `folder`."
    from lightning_fabric import Fabric
    from lightning_fabric.strategies import DDPStrategy
    data = small_data()

    def work(fabric, name):
        torch.set_num_threads(1)
        for case, (model, options) in cases.items():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                done = run_stages(small_experiment(epochs=(1, 3, 1, 1), **model),
                                  **data,
                                  runs=folder/name/case,
                                  fabric=fabric,
                                  **(dict(progress=False, log_every=1) | options))
            about = dict(weights=loop.state_hash(done.model),
                         teacher=loop.state_hash(done.model.teacher),
                         folder=str(done.folder),
                         log=done.log.drop(columns="cells_per_second").to_json(orient="records",
                                                                               double_precision=15))
            (folder/f"{name}-{case}-{fabric.global_rank}.json").write_text(json.dumps(about))

    def one(): work(Fabric(accelerator="cpu", devices=1, precision="32-true"), "one")
    def two():
        strategy = DDPStrategy(start_method="fork", find_unused_parameters=True)
        Fabric(accelerator="cpu", devices=2, precision="32-true", strategy=strategy).launch(work, "two")
    for pid in [in_child(one), in_child(two)]: assert os.waitpid(pid, 0)[1] == 0


def job(name, folder, *rest):
    "`kill` or `interrupt` FOLDER N_KILLS DAMAGES, `write` FOLDER MOST, or `share` FOLDER CASES."
    if name in ("kill", "interrupt"):
        sign = dict(kill=signal.SIGKILL, interrupt=signal.SIGINT)[name]
        report = kill_and_resume(Path(folder), int(rest[0]), damages=list(filter(None, rest[1].split(","))), sign=sign)
    if name == "write": report = killed_while_writing(Path(folder), int(rest[0]))
    if name != "share": (Path(folder)/"report.json").write_text(json.dumps(report))
    if name == "share": shared_run(Path(folder), json.loads(rest[0]))


if __name__ == "__main__":
    torch.set_num_threads(1)
    children = [in_child(lambda words=words: job(*words)) for words in json.loads(sys.argv[1])]
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0]*len(children)
