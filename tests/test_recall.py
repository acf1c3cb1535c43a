"""What a screen remembers, line by line, and how it travels with actions.

1. A line answers from its own memory or from all lines', by left-out answers; a line of its own is found where it is.
2. A row of numbers times the responses is the answer; training rows are left out, and only where they were trained on.
3. Saved memories answer as before, to the last bit; too few targets are the train mean.
4. From cells: pseudobulk changes without what the mode does to the targeted gene itself.
"""
import numpy as np
import pandas as pd
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file
from training_cases import small_data

from biojepa.actions.banks import FeatureBank
from biojepa.actions.memory import row_correlations
from biojepa.actions.recall import (
    fit_memories, line_slots, load_memories, recall_table, remember, save_memories, with_recall
)
from biojepa.actions.vocabulary import Modality
from biojepa.config import MemoryConfig
from biojepa.data.own_gene import own_gene_effects


@pytest.fixture(scope="module")
def small():
    given = small_data()
    return given["adata"], given["split"]


@pytest.fixture(scope="module")
def lines():
    "Three lines of 40 targets; features know a target's kind; y responds as x does, z in its own way."
    rng = np.random.default_rng(0)
    genes, kind = [f"g{i:02d}" for i in range(60)], rng.integers(4, size=60)
    bank = FeatureBank(tuple(genes), np.eye(4)[kind] + .2*rng.normal(size=(60, 4)), Modality.PROTEIN,
                       dict(featurizer="kind"))
    mean, own = rng.normal(size=(3, 90)), rng.normal(size=(4, 90))
    does = np.stack([own, own, 2*rng.normal(size=(4, 90))])
    truth = {line: mean[k] + does[k][kind] for k, line in enumerate("xyz")}
    targets = [(g,) for g in genes[:40]]
    delta = {line: t[:40] + .8*rng.normal(size=(40, 90)) for line, t in truth.items()}
    table = [*"x"*40, *"y"*40, *"z"*40], targets*3, np.concatenate([*delta.values()])
    return dict(truth=truth, table=table, bank=bank, memories=fit_memories(*table, [bank]), genes=genes)


def test_each_line_is_answered_by_the_better_memory(lines):
    memories = lines["memories"]
    assert memories.lines == ("x", "y", "z") and memories.shares[2] is False
    asked = [(g,) for g in lines["genes"][40:]]
    for line, truth in lines["truth"].items():
        r = row_correlations(memories.answering(line).answer(asked).delta, truth[40:])
        assert r.mean() > .9, line
    assert line_slots(memories.apart, ["z", "new", "x"]).tolist() == [2, 3, 0]


def test_a_line_that_was_never_seen_gets_what_lines_share(lines):
    said = lines["memories"].answering("new").answer([(g,) for g in lines["genes"][40:]]).delta
    assert row_correlations(said, np.mean([*lines["truth"].values()], 0)[40:]).mean() > .9


def test_numbers_times_responses_are_the_answers(lines):
    memories, asked = lines["memories"], [(lines["genes"][50],), (lines["genes"][50], lines["genes"][55]), ()]
    table = recall_table(memories, asked)
    assert table.shape == (3, 4, len(memories.responses)) and not table[2].any()
    for slot, memory in enumerate(memories.of):
        np.testing.assert_allclose(table[:2, slot] @ memories.responses, memory.answer(asked[:2]).delta, atol=1e-4)


def test_training_targets_are_left_out_where_they_were_trained_on(lines):
    genes, rng = lines["genes"], np.random.default_rng(2)
    memories = fit_memories(["x"]*30 + ["z"]*30, [(g,) for g in genes[:30] + genes[10:40]], rng.normal(size=(60, 20)),
                            [lines["bank"]])
    asked = [(g,) for g in (genes[0], genes[35], genes[50])]
    seen, blind = recall_table(memories, asked), recall_table(memories, asked, left_out=True)
    for s, memory in enumerate(memories.of):
        moved = [not np.array_equal(a[s], b[s]) for a, b in zip(seen, blind)]
        assert moved == [t in memory.perturbations for t in asked]


def test_saved_memories_answer_as_before(lines, tmp_path):
    memories, asked = lines["memories"], [(g,) for g in lines["genes"]]
    again = load_memories(save_memories(memories, tmp_path/"memory.safetensors"), [lines["bank"]])
    np.testing.assert_array_equal(recall_table(again, asked), recall_table(memories, asked))
    assert (again.lines, again.shares) == (memories.lines, memories.shares)
    (tmp_path/"x.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="x.safetensors: holds no memories"):
        load_memories(tmp_path/"x.safetensors", [lines["bank"]])


def test_a_memory_with_other_members_is_refused(lines, tmp_path):
    path = save_memories(lines["memories"], tmp_path/"memory.safetensors")
    with safe_open(path, "numpy") as file:
        arrays, about = {k: file.get_tensor(k) for k in file.keys()}, file.metadata()
    save_file(arrays | {"0.stack": arrays["0.stack"][:2]}, path, about)
    with pytest.raises(ValueError, match="memory.safetensors: holds a stack of 2 members, where 3 belong .process"):
        load_memories(path, [lines["bank"]])


@pytest.mark.parametrize("n", [1, 2, 3])
def test_too_few_targets_are_the_train_mean(lines, n):
    names, targets, delta = (part[:n] for part in lines["table"])
    memories = fit_memories(names, targets, delta, [lines["bank"]])
    said = memories.of[0].answer([(lines["genes"][50],)])
    np.testing.assert_allclose(said.delta[0], delta.mean(0))
    assert not said.known[0] and said.reliability[0] == 0 and memories.apart == ()
    no_features = fit_memories(*lines["table"], [])
    np.testing.assert_allclose(no_features.of[0].answer([("g50",)]).delta[0], lines["table"][2][:40].mean(0))


def test_from_cells_without_the_targeted_genes_own_change(small):
    adata, split = small
    bank = FeatureBank(tuple(adata.var_names), np.random.default_rng(0).normal(size=(adata.n_vars, 8)),
                       Modality.PROTEIN, {})
    told, whole = (remember(adata, split, [bank], MemoryConfig(), own_gene) for own_gene in (True, False))
    def delta(memories):
        memory = memories.of[0]
        return memory.mean + memory.scores @ memory.basis, [t[0] for t in memory.perturbations]
    (left, names), (all_of_it, _) = delta(told), delta(whole)
    effects, control = own_gene_effects(adata, split).iloc[0], adata.X[split.controls(adata, "train")].mean(0).A1
    for row, other, name in zip(left, all_of_it, names):
        g = adata.var_names.get_loc(name)
        own = (effects.factor - 1)*control[g] + effects.summand
        assert other[g] - row[g] == pytest.approx(own, abs=1e-5)
        np.testing.assert_allclose(np.delete(row, g), np.delete(other, g), atol=1e-6)


def test_guides_describe_no_gene(small):
    adata, split = small
    guides = FeatureBank(("a", "b"), np.eye(2), Modality.DNA, {})
    assert remember(adata, split, [guides], MemoryConfig()).of[0].block_weights == {}
    assert with_recall("actions", [()], None) == "actions"
