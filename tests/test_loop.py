"The training loop against a loop written out, and against everything that can interrupt it."
import errno
import json
import os
import random
import re
import resource
import signal
import sys
import types
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn

from biojepa.config import StageConfig, preset
from biojepa.core import object_hash
from biojepa.data.batches import ActionBatch, ActionPairBatch, CellBatch
from biojepa.data.loaders import BatchLoader
from biojepa.model.biojepa import BioJEPA
from biojepa.model.objectives import pretrain_loss
from biojepa.training.checkpoints import (
    Checkpointer, TrainingLog, get_randomness, read_log, set_randomness, state_hash, step_seed
)
from biojepa.training.loop import (
    DivergedError, Progress, Stage, StepOutput, choose_precision, fit, make_fabric, one_cycle, pieces_of
)
from biojepa.training.monitor import CollapseMonitor, effective_rank, encoder_latents

torch.set_num_threads(1)
X = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 1)

    def forward(self, x): return self.second(self.first(x).tanh())


def new(seed=0):
    torch.manual_seed(seed)
    return Tiny()


def step(model, batch, generator):
    noise = torch.rand(len(batch.x), 1, generator=generator)
    loss = (model(batch.x) - batch.x.sum(1, keepdim=True) + .1*noise).square().mean()
    return StepOutput(loss, {"mse": loss.detach()}, len(batch.x))


def careless_step(model, batch, generator):
    "Draws from every global generator, too."
    out = step(model, batch, generator)
    return out._replace(loss=out.loss*(1 + torch.rand(1) + random.random() + np.random.rand()).squeeze())


def loader(n=60, batch_size=16, **options):
    return BatchLoader(lambda epoch: np.arange(n),
                       lambda rows: CellBatch(X[rows], torch.zeros(len(rows)), torch.from_numpy(rows)),
                       batch_size, **options)


def stage(epochs=4, trains=None, step=step, loader_options={}, config={}, **options):
    return Stage("tiny", StageConfig(**(dict(epochs=epochs, batch_size=16, lr=.05) | config)), step, trains
                 or {"first": .05, "second": .05}, loader(**loader_options), **options)


def quiet(model, stage, folder, **options): return fit(model, stage, folder, **({"progress": False} | options))


def same_log(a, b):
    pd.testing.assert_frame_equal(a.drop(columns="cells_per_second"),
                                  b.drop(columns="cells_per_second"),
                                  check_exact=True)


# the recipe

def test_fit_is_the_loop_written_out(tmp_path):
    model = new()
    plain = new()
    s = stage(trains={"first": .05, "second": .01}, config=dict(clip_norm=.5, weight_decay=.3))
    log = quiet(model, s, tmp_path, seed=3, log_every=1)
    groups = [dict(params=plain.first.parameters(), lr=.05), dict(params=plain.second.parameters(), lr=.01)]
    optimizer = torch.optim.AdamW(groups, weight_decay=.3, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [.05, .01], total_steps=16, pct_start=.05)
    losses, rates, batches, n = [], [], loader(), 0
    for epoch in range(4):
        batches.set_epoch(epoch)
        for batch in batches:
            optimizer.zero_grad()
            loss = step(plain, batch, torch.Generator().manual_seed(step_seed(3, "tiny", n))).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(plain.parameters(), .5)
            rates.append(schedule.get_last_lr()); optimizer.step(); n += 1
            if n < 16: schedule.step()
            losses.append(loss.item())
    assert state_hash(model) == state_hash(plain)
    assert log.loss.tolist() == losses and log[["lr", "lr_second"]].values.tolist() == rates
    assert log.step.tolist() == [*range(1, 17)] and log.epoch.tolist() == [1]*4 + [2]*4 + [3]*4 + [4]*4


@pytest.mark.parametrize("total, warmup", [(1, .05), (2, .05), (19, .05), (20, .05), (21, .05), (10, .1),
                                          (7, 0.)])
def test_one_cycle_of_any_length_starts_low_and_ends_lower(total, warmup):
    optimizer, schedule = one_cycle(new(),
                                    stage(config=dict(warmup=warmup), trains={"first": .1, "second": .01}),
                                    total)
    rates = [schedule.get_last_lr()]
    for _ in range(total - 1): optimizer.step(); schedule.step(); rates.append(schedule.get_last_lr())
    rates = np.array(rates)
    np.testing.assert_allclose(rates[:, 0], 10*rates[:, 1])
    assert (rates <= .1 + 1e-12).all() and np.isclose(rates[-1, 0], .1/25/1e4)


def test_clipping_can_be_switched_off(tmp_path):
    models = {clip: new() for clip in (None, 1e9, .1)}
    for clip, model in models.items(): quiet(model, stage(config=dict(clip_norm=clip)), tmp_path/str(clip))
    assert state_hash(models[None]) == state_hash(models[1e9]) != state_hash(models[.1])


def test_equal_seeds_give_equal_numbers_and_leave_the_caller_alone(tmp_path):
    torch.manual_seed(5); random.seed(5); np.random.seed(5)
    before = get_randomness()
    models = {name: new() for name in "abc"}
    set_randomness(*before)
    logs = {
        name: quiet(models[name], stage(), tmp_path/name, seed=seed)
        for name, seed in dict(a=1, b=1, c=2).items()
    }
    after = get_randomness()
    assert json.dumps(before[0]) == json.dumps(after[0]) and torch.equal(before[1]["torch"], after[1]["torch"])
    same_log(logs["a"], logs["b"])
    assert state_hash(models["a"]) == state_hash(models["b"]) != state_hash(models["c"])


def test_seeds_of_steps_differ():
    assert len({
        step_seed(s, name, n) for s in (0, 1) for name in ("pretrain", "dynamics") for n in range(200)
    }) == 800


# what is not trained

def test_untrained_parts_keep_every_byte_and_everything_is_restored(tmp_path):
    torch.manual_seed(0)
    model = BioJEPA(
        preset("smoke").model.changed(n_genes=20,
                                      d_model=8,
                                      d_protein=6,
                                      d_dna=6,
                                      d_chemical=6,
                                      d_action=8,
                                      n_encoder_layers=1,
                                      n_predictor_layers=1,
                                      n_masked_predictor_layers=1))
    next(model.predictor.parameters()).requires_grad_(False)
    required = {n: p.requires_grad for n, p in model.named_parameters()}
    x = torch.rand(12, 20)
    cells = BatchLoader(lambda epoch: np.arange(12),
                        lambda r: CellBatch(x[r], torch.zeros(len(r)), torch.from_numpy(r)), 4)
    def pretrain(model, batch, generator):
        loss = pretrain_loss(model, batch, generator=generator)
        assert {n.split(".")[0] for n, p in model.named_parameters()
                if p.requires_grad} == {"encoder", "masked_predictor"}
        return StepOutput(loss.total, {}, len(batch.x))
    before = {n: state_hash(m) for n, m in model.named_children()}
    quiet(
        model,
        Stage("pretrain", StageConfig(epochs=2, batch_size=4, lr=.1, weight_decay=.5), pretrain,
              {"encoder": .1, "masked_predictor": .1}, cells), tmp_path)
    changed = {n for n, m in model.named_children() if state_hash(m) != before[n]}
    assert changed == {"encoder", "masked_predictor"}
    assert required == {n: p.requires_grad for n, p in model.named_parameters()}
    assert all(p.grad is None for p in model.parameters())


def test_parts_are_restored_after_an_error(tmp_path):
    def broken(model, batch, generator): raise RuntimeError("broken")
    model = new()
    with pytest.raises(RuntimeError, match="broken"):
        quiet(model, stage(step=broken, trains={"first": .1}), tmp_path)
    assert all(p.requires_grad for p in model.parameters())


def test_unknown_part_and_nothing_to_train_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no part 'third'; choose from first, second"):
        quiet(new(), stage(trains={"third": .1}), tmp_path)
    with pytest.raises(ValueError, match="trains nothing"):
        Stage("none", StageConfig(epochs=1, batch_size=1, lr=1), step, {}, loader())
    with pytest.raises(ValueError, match="accumulate"): quiet(new(), stage(), tmp_path, accumulate=0)


def test_after_step_sees_every_step(tmp_path):
    seen = []
    quiet(new(), stage(epochs=2, after_step=lambda model, step, total: seen.append((step, total))), tmp_path)
    assert seen == [(n, 8) for n in range(1, 9)]


# pieces

@pytest.mark.parametrize("k", [2, 3, 5, 100])
def test_pieces_add_up_to_the_batch_for_means_over_cells(k, tmp_path):
    whole = quiet(new(), stage(), tmp_path/"whole", log_every=1)
    pieces = quiet(new(), stage(), tmp_path/"pieces", log_every=1, accumulate=k)
    np.testing.assert_allclose(whole.loss, pieces.loss, rtol=1e-5)
    np.testing.assert_allclose(whole.grad_norm, pieces.grad_norm, rtol=1e-4)
    assert whole.lr.equals(pieces.lr)


def test_vicreg_moments_are_those_of_the_pieces(tmp_path):
    "A mean over cells is that of its pieces; the variance of a batch is not the mean of its parts' variances."
    x = torch.rand(16, 20, generator=torch.Generator().manual_seed(0))
    cells = BatchLoader(lambda epoch: np.arange(16),
                        lambda r: CellBatch(x[r], torch.zeros(len(r)), torch.from_numpy(r)), 16)
    def pretrain(model, batch, generator):
        loss = pretrain_loss(model, batch, generator=generator)
        return StepOutput(loss.total, {k: v.detach() for k, v in loss._asdict().items() if k != "total"},
                          len(batch.x))
    def run(k, weights):
        torch.manual_seed(0)
        model = BioJEPA(
            preset("smoke").model.changed(n_genes=20,
                                          d_model=8,
                                          n_encoder_layers=1,
                                          n_masked_predictor_layers=1,
                                          mask_kind="exact",
                                          vicreg_weights=weights))
        s = Stage("pretrain", StageConfig(epochs=4, batch_size=16, lr=1e-3), pretrain,
                  {"encoder": 1e-3, "masked_predictor": 1e-3}, cells)
        return quiet(model, s, tmp_path/f"{k}{weights}", accumulate=k, log_every=1)
    np.testing.assert_allclose(run(1, (25., 0., 0.)).loss, run(4, (25., 0., 0.)).loss, rtol=1e-5)
    whole, pieces = run(1, (25., 25., 1.)), run(4, (25., 25., 1.))
    assert (whole.variance - pieces.variance).abs().iloc[0] > 1e-4 and np.isclose(
        whole.invariance.iloc[0], pieces.invariance.iloc[0], rtol=1e-5)


def test_pieces_cut_every_kind_of_batch():
    actions = ActionBatch(torch.randn(5, 2, 3), *(torch.arange(10).view(5, 2) for _ in range(3)))
    batch = ActionPairBatch(actions, actions, torch.arange(5))
    pieces = [*pieces_of(batch, 2)]
    assert [p.target.tolist() for p, _ in pieces] == [[0, 1], [2, 3, 4]] and [s for _, s in pieces] == [.4, .6]
    assert torch.equal(torch.cat([p.anchor.features for p, _ in pieces]), actions.features)
    assert len([*pieces_of(batch, 9)]) == 5


# interruptions

@pytest.mark.parametrize("every", [1, 3, 4, 7])
def test_interrupted_anywhere_ends_the_same(every, tmp_path):
    validate = lambda model: dict(val=model.first.weight.norm().item())
    options = dict(checkpoint_every=every, log_every=3, validate_every=5)
    plain = quiet(whole := new(), stage(validate=validate, step=careless_step), tmp_path/"plain", **options)
    stops = {2, 5, 8, 11, 16}
    def stop(model, n, total):
        if n in stops: stops.remove(n); os.kill(os.getpid(), signal.SIGINT)
    for attempt in range(6):
        try:
            log = quiet(
                model := new(),
                stage(validate=validate, step=careless_step, after_step=stop), tmp_path/"stopped", **options)
            break
        except KeyboardInterrupt as interrupted:
            last = Checkpointer(tmp_path/"stopped"/"checkpoints").steps()
            assert (f"checkpoint of step {last[-1]} in"
                    if last else "no checkpoint yet") in str(interrupted)
    assert attempt == 5 and state_hash(model) == state_hash(whole)
    same_log(log, plain)
    same_log(pd.DataFrame(read_log(tmp_path/"stopped"/"log.csv"), columns=log.columns), plain)


def full_disk(limit):
    "No file may grow past `limit` bytes: a write beyond fails as on a full disk, with another number."
    return resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def test_full_disk_leaves_the_last_checkpoint(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    def fills(model, n, total):
        if n == 10: full_disk(2000)
    quiet(whole := new(), stage(), tmp_path/"plain")
    try:
        with pytest.raises(
                OSError,
                match="cannot write the checkpoint of step 12 .*a limit on the files .* is reached.*The last one is "
                      "of step 8; start again"
        ) as failed:
            quiet(new(), stage(after_step=fills), tmp_path/"full", log_every=100)
    finally:
        full_disk(before)
    assert failed.value.errno == errno.EFBIG
    assert sorted(p.name for p in (tmp_path/"full"/"checkpoints").iterdir()) == [
        f"step-00000000{n}.{s}" for n in (4, 8) for s in ("json", "safetensors")
    ]
    quiet(model := new(), stage(), tmp_path/"full")
    assert state_hash(model) == state_hash(whole)


def test_full_disk_before_any_checkpoint_says_so(tmp_path, monkeypatch):
    def no_room(descriptor): raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "fsync", no_room)
    with pytest.raises(OSError,
                       match="No space left on device.*are free.*The last one is none, training has to begin again"):
        Checkpointer(tmp_path).save(4, {}, {"w": torch.zeros(1)})
    assert not [*tmp_path.iterdir()]


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    def explodes(model, batch, generator):
        out = step(model, batch, generator)
        return out._replace(loss=out.loss*float("nan")) if done == [5] else out
    done = []
    s = stage(step=explodes, after_step=lambda model, n, total: done.__setitem__(slice(None), [n]))
    with pytest.raises(FloatingPointError, match="loss is nan at step [5-8]"):
        quiet(new(), s, tmp_path)
    assert Checkpointer(tmp_path/"checkpoints").steps() == [4]
    assert all(t.isfinite().all() for t in Checkpointer(tmp_path/"checkpoints").latest().tensors.values()
               if t.is_floating_point())


# checkpoints

def spoil(path, how):
    content = path.read_bytes()
    if how == "flipped": path.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    if how == "cut": path.write_bytes(content[:len(content)//2])
    if how == "empty": path.write_bytes(b"")
    if how == "gone": path.unlink()


@pytest.mark.parametrize("how", ["flipped", "cut", "empty", "gone"])
@pytest.mark.parametrize("suffix", [".safetensors", ".json"])
def test_damaged_newest_checkpoint_falls_back_and_ends_the_same(suffix, how, tmp_path):
    quiet(whole := new(), stage(), tmp_path/"plain")
    def stop(model, n, total):
        if n == 11: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): quiet(new(), stage(after_step=stop), tmp_path/"run")
    checkpoints = Checkpointer(tmp_path/"run"/"checkpoints")
    spoil(checkpoints.path(8, suffix), how)
    if (suffix, how) == (".json", "gone"): assert checkpoints.latest().step == 4  # as if it was never written
    else:
        with pytest.warns(
                UserWarning,
                match=rf"damaged checkpoint: .*step-000000008\{suffix}.*going back to the one before"):
            assert checkpoints.latest().step == 4
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        log = quiet(model := new(), stage(), tmp_path/"run")
    assert state_hash(model) == state_hash(whole) and log.step.is_unique


def test_a_changed_number_in_the_json_is_noticed(tmp_path):
    Checkpointer(tmp_path).save(7, dict(rate=.125), {})
    path = Checkpointer(tmp_path).path(7)
    path.write_text(path.read_text().replace("0.125", "0.126"))
    with pytest.raises(ValueError, match="step-000000007.json: its content is not what was written"):
        Checkpointer(tmp_path).load(7)


def test_all_checkpoints_damaged_begins_again(tmp_path):
    quiet(whole := new(), stage(), tmp_path)
    for path in (tmp_path/"checkpoints").glob("*.safetensors"): spoil(path, "cut")
    with pytest.warns(UserWarning, match="damaged checkpoint") as warned:
        quiet(model := new(), stage(), tmp_path)
    assert len(warned) == 2 and state_hash(model) == state_hash(whole)


def test_leftovers_of_killed_processes_are_removed_and_two_checkpoints_stay(tmp_path):
    checkpoints = Checkpointer(tmp_path)
    (tmp_path/".step-000000003.99.tmp.safetensors").write_bytes(b"half")
    (tmp_path/"step-000000002.safetensors").write_bytes(b"without its json")
    for n in (1, 4, 5, 6): checkpoints.save(n, {}, {"w": torch.zeros(1)})
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "step-000000005.json", "step-000000005.safetensors", "step-000000006.json",
        "step-000000006.safetensors"
    ]
    assert Checkpointer(tmp_path/"nothing").latest() is None


def test_checkpoint_holds_nothing_pickled_and_every_kind_of_tensor(tmp_path):
    tensors = dict(a=torch.randn(3, 2).T,
                   b=torch.tensor(True),
                   c=torch.randn(2).bfloat16(),
                   d=torch.zeros(0),
                   e=torch.arange(3))
    Checkpointer(tmp_path).save(1, dict(x=[1, None, .1 + .2]), tensors)
    found = Checkpointer(tmp_path).latest()
    assert found.state == dict(x=[1, None, .1 + .2]) and all(
        torch.equal(found.tensors[k], v) and found.tensors[k].dtype == v.dtype for k, v in tensors.items())


# what a folder belongs to

CHANGES = {
    "config": dict(stage=dict(config=dict(weight_decay=.1))),
    "trains": dict(stage=dict(trains={"first": .05})),
    "seed": dict(seed=1),
    "accumulate": dict(accumulate=2),
    "weights": dict(model=1),
    "early_stop": dict(early_stop=(3, "loss")),
    "loader state": dict(stage=dict(loader_options=dict(seed=1))),
}


@pytest.mark.parametrize("what, change", CHANGES.items(), ids=CHANGES)
def test_a_changed_run_is_refused_by_name(what, change, tmp_path):
    quiet(new(), stage(), tmp_path)
    options = {k: v for k, v in change.items() if k not in ("stage", "model")}
    with pytest.raises(ValueError, match=what):
        quiet(new(change.get("model", 0)), stage(**change.get("stage", {})), tmp_path, **options)


def test_a_finished_stage_is_only_read(tmp_path):
    log = quiet(trained := new(), stage(), tmp_path)
    def never(*_): raise AssertionError("a step was done")
    again = quiet(read := new(), stage(step=never), tmp_path)
    assert state_hash(read) == state_hash(trained)
    pd.testing.assert_frame_equal(again, log)


def test_intervals_of_checkpoints_and_log_may_change(tmp_path):
    def stop(model, n, total):
        if n == 10: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        quiet(new(), stage(after_step=stop), tmp_path/"a", checkpoint_every=3)
    quiet(model := new(), stage(), tmp_path/"a", checkpoint_every=5, log_every=2)
    quiet(whole := new(), stage(), tmp_path/"b")
    assert state_hash(model) == state_hash(whole)


# stopping early

def test_early_stop_ends_the_stage_for_good(tmp_path):
    values = iter([9., 5., 4., 6., 7., 3.])
    s = lambda: stage(epochs=6, validate=lambda model: dict(val=next(values)))
    log = quiet(model := new(), s(), tmp_path, early_stop=(2, "val"))
    assert log.step.iloc[-1] == 16 and log.val.dropna().tolist() == [9., 5., 4., 6., 7.]
    again = quiet(read := new(), s(), tmp_path, early_stop=(2, "val"))
    assert state_hash(read) == state_hash(model) and len(again) == len(log)
    with pytest.raises(ValueError,
                       match="early_stop: the log has no column 'loss_of_nothing'; it has step"):
        quiet(new(), stage(), tmp_path/"b", early_stop=(1, "loss_of_nothing"))


# the log

def test_log_rows_are_means_since_the_row_before(tmp_path):
    each, rare = (quiet(new(),
                        stage(),
                        tmp_path/str(k),
                        log_every=k,
                        checkpoint_every=100,
                        validate_every=100) for k in (1, 5))
    assert rare.step.tolist() == [5, 10, 15, 16]
    expected = each.groupby(pd.cut(each.step, [0, 5, 10, 15, 16]), observed=True).loss.mean()
    np.testing.assert_allclose(rare.loss, expected, rtol=1e-6)
    assert (rare.cells_per_second > 0).all()


def test_log_survives_an_unfinished_line_and_new_columns(tmp_path):
    log = TrainingLog(tmp_path/"log.csv")
    for row in (dict(step=1, loss=.1 + .2), dict(step=2,
                                                 loss=float("inf")), dict(step=3, loss=1e-300, val=-2)):
        log.append(row)
    with open(log.path, "a") as f: f.write("4,0.")
    assert read_log(log.path) == log.rows and read_log(log.path, until=2) == log.rows[:2] and read_log(
        tmp_path/"none.csv") == []
    assert TrainingLog(log.path, read_log(log.path, 2)).frame.step.tolist() == [1, 2]
    assert log.path.read_text().splitlines() == ["step,loss", "1,0.30000000000000004", "2,inf"]


def test_a_log_that_was_cut_anywhere_never_gives_a_wrong_number(tmp_path):
    "Of 0.125 a cut may leave 0.1, which reads as well; so a line without its break is no row."
    log = TrainingLog(tmp_path/"log.csv")
    for n in range(3): log.append(dict(step=n, loss=n + .123456, grad_norm=1/(n + 3), cells_per_second=12.25))
    for name in ("log.csv", "speed.csv"):
        content = (tmp_path/name).read_bytes()
        for end in range(len(content) + 1):
            (tmp_path/name).write_bytes(content[:end])
            for row in read_log(log.path):
                assert row.items() <= log.rows[row["step"]].items(), f"{name} cut after {end} bytes"
        (tmp_path/name).write_bytes(content)
    assert read_log(log.path) == log.rows


def test_a_full_disk_leaves_whole_rows(tmp_path):
    "The limit falls into the middle of a row, in a process of its own."
    log = TrainingLog(tmp_path/"log.csv", [dict(step=0, loss=.5)])
    pid = os.fork()
    if not pid:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (24, 24))
        try: [log.append(dict(step=n, loss=.5)) for n in range(1, 9)]
        except OSError as error: os._exit(0 if "cannot write a row of the log (File too large)" in str(error) else 2)
        os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0
    assert log.path.read_text() == "step,loss\n0,0.5\n1,0.5\n"


# getting worse

def blows_up(at, factor, **config):
    "A stage whose loss is multiplied from a step on."
    done = [0]
    def worse(model, batch, generator):
        out = step(model, batch, generator)
        return out._replace(loss=out.loss*factor) if done[0] >= at else out
    return stage(step=worse, after_step=lambda model, n, total: done.__setitem__(0, n), config=config)


@pytest.mark.parametrize("config, why", {
    "loss": (dict(clip_norm=1.), r"the loss is .*, its best was .*, a rise of more than 10 sizes at step 1\d"),
    "gradient": (dict(loss_limit=None, gradient_limit=30.), "the gradient norm is .*, more than 30 times its best"),
    "end": (dict(loss_limit=None, gradient_limit=None), "the loss ends at .*, above its start of .* at step 16"),
}.values(), ids=["loss", "gradient", "end"])
def test_a_stage_that_gets_worse_fails_by_name_and_keeps_its_last_checkpoint(config, why, tmp_path):
    message = f"stage 'tiny': {why}.*the checkpoint of step \\d+ in .* is from before. Lower tiny.lr .now 0.05., clip"
    for _ in range(2):  # the second time from the checkpoint
        with pytest.raises(DivergedError, match=message):
            quiet(new(), blows_up(9, 100., **config), tmp_path, log_every=1)
        kept = Checkpointer(tmp_path/"checkpoints")
        assert kept.steps()[-1] in (8, 12) and not kept.latest().state["finished"]


def test_a_rate_of_ten_fails_and_limits_can_be_lifted(tmp_path):
    def s(**config): return stage(epochs=30, trains=dict(first=10., second=10.), config=dict(clip_norm=None) | config)
    with pytest.raises(DivergedError, match="stage 'tiny': the loss"): quiet(new(), s(), tmp_path/"a")
    log = quiet(new(), s(loss_limit=None, gradient_limit=None, end_limit=None), tmp_path/"b")
    assert log.step.iloc[-1] == 120 and log.loss.max() > 20*log.loss.iloc[0]


def test_a_stage_that_ended_worse_than_it_began_is_not_read_as_finished(tmp_path):
    "As it was saved before there were limits."
    def limits(value): return blows_up(9, 100., loss_limit=None, gradient_limit=None, end_limit=value)
    quiet(new(), limits(None), tmp_path, log_every=1)
    path = next(reversed(sorted((tmp_path/"checkpoints").glob("*.json"))))
    saved = json.loads(path.read_text())
    del saved["check"], saved["state"]["about"]["config"]["end_limit"]
    path.write_text(json.dumps(saved | dict(check=object_hash(saved))))
    with pytest.raises(DivergedError, match="the loss ends at"): quiet(new(), limits(.5), tmp_path, log_every=1)


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=2, max_size=40), st.integers(1, 39))
def test_a_resumed_stage_is_judged_as_one_in_one_go(losses, cut):
    config = StageConfig(epochs=1, batch_size=1, lr=1)
    rows = [dict(step=n, loss=loss, grad_norm=abs(loss)) for n, loss in enumerate(losses)]
    whole, resumed = Progress(config), Progress(config, rows[:cut])
    assert [whole.add(r) for r in rows][cut:] == [resumed.add(r) for r in rows[cut:]]
    assert whole.ended() == resumed.ended()


@given(st.floats(.01, 100), st.floats(-50, 50), st.integers(0, 2**32 - 1))
def test_noise_about_a_falling_loss_of_any_sign_is_no_divergence(scale, shift, seed):
    "A loss that falls by its scale, with noise of a fifth of it: a likelihood may pass 0 on the way."
    noise = np.random.default_rng(seed).normal(size=60)
    losses = scale*(np.exp(-np.arange(60)/15) + .2*noise.clip(-2.5, 2.5)) + shift*scale
    progress = Progress(StageConfig(epochs=1, batch_size=1, lr=1))
    assert not any(progress.add(dict(step=n, loss=loss, grad_norm=1.)) for n, loss in enumerate(losses))
    assert progress.ended() is None


def test_a_gradient_that_vanishes_and_returns_is_no_divergence():
    "Pairs that are learned by heart leave no gradient; the next noise is a thousand times it."
    progress = Progress(StageConfig(epochs=1, batch_size=1, lr=1))
    values = [(4, 7.), (3, 6.), (.1, 1e-4), (.2, 3.)]
    rows = [dict(step=n, loss=loss, grad_norm=norm) for n, (loss, norm) in enumerate(values)]
    assert not any(progress.add(row) for row in rows)
    assert "the gradient norm is 1000, more than" in progress.add(dict(step=9, loss=.2, grad_norm=1e3))


def test_validation_runs_in_evaluation_mode_without_gradient(tmp_path):
    seen = []
    def validate(model):
        seen.append((model.training, torch.is_grad_enabled()))
        return dict(val=torch.tensor(1.))
    quiet(model := new().eval(), stage(epochs=1, validate=validate), tmp_path)
    assert seen == [(False, False)]*2 and model.training is False


def test_tensorboard_is_written_if_it_is_there(tmp_path, monkeypatch):
    rows = []
    class Writer:
        def __init__(self, folder): self.folder = folder
        def add_scalar(self, name, value, step): rows.append((name, value, step))
        def flush(self): pass
    module = types.ModuleType("torch.utils.tensorboard"); module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    log = quiet(new(), stage(epochs=1), tmp_path/"a", tensorboard=True)
    assert ("loss", log.loss.iloc[-1], 4) in rows
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="pip install tensorboard"):
        quiet(new(), stage(epochs=1), tmp_path/"b", tensorboard=True)


def test_progress_bar_shows_losses_and_speed(tmp_path, capsys):
    fit(new(), stage(epochs=1), tmp_path, log_every=1)
    text = capsys.readouterr().err
    assert "tiny: 100%" in text and "mse=" in text and "cells_per_second=" in text


# devices

def test_precision_is_bfloat16_only_where_it_pays(monkeypatch):
    cpu = torch.device("cpu")
    for has, width, expected in ((dict(avx512_bf16=True), 256, "bf16-mixed"), (dict(amx_bf16=True), 128,
                                                                               "bf16-mixed"),
                                 (dict(avx512_bf16=True), 64, "32-true"), ({}, 256, "32-true")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
        assert choose_precision(width, cpu) == expected
    assert choose_precision(256, torch.device("mps")) == "32-true"
    for supported, expected in ((True, "bf16-mixed"), (False, "32-true")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: supported)
        assert choose_precision(16, torch.device("cuda")) == expected


def test_bfloat16_keeps_weights_and_moments_in_float32(tmp_path):
    fabric = make_fabric(3, "cpu", precision="bf16-mixed")
    seen = []
    def watch(model, batch, generator):
        seen.append(model.first(batch.x).dtype)
        return step(model, batch, generator)
    log = quiet(model := new(), stage(step=watch), tmp_path, fabric=fabric)
    assert set(seen) == {torch.bfloat16} and {p.dtype for p in model.parameters()
                                              } == {torch.float32} and log.loss.iloc[-1] < log.loss.iloc[0]
    tensors = Checkpointer(tmp_path/"checkpoints").latest().tensors
    assert {t.dtype for n, t in tensors.items() if n.startswith("optimizer.")} == {torch.float32}
    with pytest.raises(ValueError, match="precision was 'bf16-mixed', is '32-true'"):
        quiet(new(), stage(), tmp_path)


# collapse

def test_effective_rank_is_the_naive_formula():
    rng = np.random.default_rng(0)
    for shape, scale in (((40, 6), 1), ((5, 9), 1e-3), ((30, 8), 100)):
        z = rng.normal(size=shape)*rng.uniform(.01, 1, shape[1])*scale + 7
        s = np.linalg.svd(z - z.mean(0), compute_uv=False)
        p = s[s > 1e-12*s[0]]/s.sum()
        assert np.isclose(effective_rank(torch.tensor(z)).item(), np.exp(-(p*np.log(p)).sum()), rtol=1e-6)
    batch = torch.randn(3, 20, 5)
    np.testing.assert_allclose(effective_rank(batch), [effective_rank(z) for z in batch])


def test_effective_rank_of_rounding_noise_is_zero():
    z = (torch.full((100, 16), .3) + 1e-8*torch.randn(100, 16))
    assert effective_rank(z).item() == 0 and effective_rank(torch.zeros(10, 4)).item() == 0
    line = torch.randn(100, 1)*torch.randn(1, 16) + 1000
    assert np.isclose(effective_rank(line).item(), 1, atol=1e-3)


class Latents(nn.Module):
    "Hands out latents of chosen rank and size."
    def __init__(self, directions, scale=1.):
        super().__init__()
        self.directions, self.scale, self.dummy = directions, scale, nn.Parameter(torch.zeros(1))


def look(model, cells, genes):
    z = torch.zeros(len(genes), len(cells.x), 12)
    z[..., :model.directions] = torch.randn(
        len(cells.x), model.directions, generator=torch.Generator().manual_seed(len(cells.x)))*model.scale
    return dict(z=z)


def test_monitor_warns_once_when_rank_or_spread_falls():
    cells = CellBatch(torch.zeros(50, 4), torch.zeros(50), torch.arange(50))
    monitor = CollapseMonitor(Latents(12), cells, torch.arange(3), latents=look)
    assert monitor.start["rank_z"] > 10 and monitor(Latents(7))["collapsed"] == 0
    with pytest.warns(UserWarning) as said: assert monitor(Latents(4))["collapsed"] == 1
    assert sorted(re.sub(r"\d+\.?\d*", "#", str(w.message)) for w in said) == [
        f"latents collapse: {k} is #, it began at #; cells are hardly told apart"
        for k in ("rank_z", "std_z")
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert monitor(Latents(4))["collapsed"] == 1  # said once, noted each time
    small = CollapseMonitor(Latents(12), cells, torch.arange(3), latents=look)
    with pytest.warns(UserWarning, match=r"std_z is 0.4\d*, it began at 0.94"):
        assert small(Latents(12, .48))["collapsed"] == 1  # below half of its start
    with pytest.warns(UserWarning, match="std_z is 0.00"):
        assert CollapseMonitor(Latents(12, 4e-3), cells, torch.arange(3), latents=look)(Latents(
            12, 4e-3))["collapsed"] == 1  # below the floor from the start
    with pytest.warns(UserWarning, match="rank_z"):
        assert CollapseMonitor(Latents(1), cells, torch.arange(3), latents=look)(
            Latents(1))["collapsed"] == 1  # below the floor from the start


def test_monitor_measures_spread_across_cells_at_a_gene_not_across_genes():
    "An encoder that knows only the gene has latents that differ everywhere, and has collapsed."
    genes_only = lambda model, cells, genes: dict(z=torch.randn(
        5, 1, 8, generator=torch.Generator().manual_seed(0)).expand(5, len(cells.x), 8))
    with pytest.warns(UserWarning):
        found = CollapseMonitor(Latents(1),
                                CellBatch(torch.zeros(40, 4), torch.zeros(40), torch.arange(40)),
                                torch.arange(5),
                                latents=genes_only)(Latents(1))
    assert found["rank_z"] == 0 and found["std_z"] == 0 and found["collapsed"] == 1


def test_monitor_does_not_depend_on_how_cells_are_cut():
    torch.manual_seed(0)
    model = BioJEPA(preset("smoke").model.changed(n_genes=20, d_model=8, n_encoder_layers=1))
    cells = CellBatch(torch.rand(150, 20), torch.randn(150), torch.arange(150))
    z = encoder_latents(model, cells, torch.arange(0, 20, 4))["encoder"]
    found = CollapseMonitor(model, cells, torch.arange(0, 20, 4)).start
    assert np.isclose(found["rank_encoder"], effective_rank(z).mean().item(), rtol=1e-4)
