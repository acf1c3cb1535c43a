"""Spaces of actions against naive forms; pathway and mechanism questions find what is planted and say what does
not apply."""
import numpy as np
import pandas as pd
import pytest
import torch

from biojepa.actions.action_tokens import action_batch
from biojepa.actions.featurizers import featurize
from biojepa.actions.vocabulary import ActionTable, Modality
from biojepa.config import preset
from biojepa.data.datasets import load_dataset
from biojepa.data.download import read_card
from biojepa.data.means import group_means
from biojepa.data.preprocess import prepare
from biojepa.data.splits import make_split
from biojepa.explore import pathways as g
from biojepa.explore.relations import label_relation
from biojepa.explore.released import released_labels, released_neighbours, released_pathways, released_ratio
from biojepa.explore.representations import gene_embeddings
from biojepa.model.biojepa import BioJEPA
from biojepa.predict.model import Subject, predictions


@pytest.fixture(scope="module")
def screen():
    "A small screen with doubles, its split, actions of two tokens and an untrained model."
    spec = dict(n_genes=60,
                n_cells=600,
                n_targets=12,
                n_modules=4,
                n_batches=2,
                n_doubles=4,
                n_cell_types=2,
                control_fraction=.2)
    adata = prepare(
        load_dataset(read_card("simulated").changed(simulate=spec, cells=None, genes=None, targets=None)))
    singles = sorted(c for c in set(adata.obs.condition.astype(str)) if c.endswith("+ctrl"))
    rest = sorted(set(adata.obs.condition.astype(str)) - {*singles, "ctrl"})
    split = make_split(adata,
                       "custom",
                       held_out=dict(train=singles[:7] + rest[:2],
                                     val=singles[7:9],
                                     test=singles[9:] + rest[2:]))
    table = ActionTable.from_anndata(adata)
    banks = [
        featurize("kmer",
                  adata.uns["protein_sequences"],
                  modality=Modality.PROTEIN,
                  progress=False,
                  cache=False),
        featurize("kmer", {k: s for k, s in zip(table.guide_id, table.guide_seqs) if s},
                  modality=Modality.DNA,
                  progress=False,
                  cache=False)
    ]
    torch.manual_seed(0)
    config = preset("smoke").model
    model = BioJEPA(config.changed(n_genes=60, d_protein=banks[0].width, d_dna=banks[1].width))
    return Subject(model, adata, split, action_batch(table, banks), table)


def test_action_spaces_are_means_of_what_each_guide_has(screen):
    model, adata, split, actions, table = screen
    guides, merged = (g.action_spaces(screen, by=by, n_cells=3, progress=False)
                      for by in ("perturbation", "condition"))
    assert set(guides.actions["part"]) == {"train", "val", "test"
                                           } and not any(c == "ctrl" for c in guides.actions["condition"])
    two = guides.actions["condition"] == merged.actions["condition"][0]
    weight = guides.actions["n_cells"][two]
    assert two.sum() == 2
    for name in guides.spaces:
        np.testing.assert_allclose(merged.spaces[name][0],
                                   np.average(guides.spaces[name][two], axis=0, weights=weight),
                                   atol=1e-6)
    row = table.perturbation.index(guides.actions["perturbation"][0])
    with torch.inference_mode(): latent = model.composer(actions.take([row]))[0][actions.present[row]].mean(0)
    np.testing.assert_allclose(guides.spaces["action latents"][0], latent.numpy(), atol=1e-6)
    means = group_means(adata, np.flatnonzero(adata.obs.perturbation == guides.actions["perturbation"][0]),
                        np.flatnonzero(adata.obs.condition == "ctrl"), "perturbation")
    np.testing.assert_allclose(guides.spaces["observed responses"][0],
                               means.delta.mean(0)[~adata.var_names.isin(table.genes)],
                               atol=1e-6)
    with pytest.raises(ValueError, match="by: found 'guide'"): g.action_spaces(screen, by="guide")
    with pytest.raises(ValueError, match="n_cells: found 0"): g.action_spaces(screen, n_cells=0)


def test_predicted_responses_are_those_of_predict_on_the_same_cells(screen):
    model, adata, split, actions, table = screen
    p = int(table.rows(adata, split, "test")[0])
    controls = g.drawn_controls(adata, 10**6)
    got = g.predicted_responses(model, adata, actions, table, np.array([p]), controls, progress=False)[0]
    line = adata.obs.cell_type[adata.obs.perturbation == table.perturbation[p]].unique()
    controls = np.flatnonzero((adata.obs.condition == "ctrl") & adata.obs.cell_type.isin(line))
    slow = []
    with torch.inference_mode():
        for c in controls:
            x = torch.from_numpy(adata.X[[c]].toarray())
            size = torch.tensor(adata.obs["log_library_size"].to_numpy()[[c]])
            slow.append(
                model.readout.delta(
                    model.predict_latent(x, size, actions.take([p])).mean,
                    model.teacher(x, size).genes())[0].numpy())
    np.testing.assert_allclose(got, np.mean(slow, 0), atol=1e-4)


def test_crossed_puts_both_sides_on_one_scale():
    rng = np.random.default_rng(0)
    x, ask = rng.normal(size=(20, 4)), np.arange(20) < 6
    both = g.crossed(100*x + 7, x, ask)
    np.testing.assert_allclose(both, g.crossed(x, x, ask), atol=1e-9)
    assert np.allclose([np.sqrt((both[m]**2).sum(1).mean()) for m in (ask, ~ask)], 1)
    with pytest.raises(ValueError, match="the same items and columns"): g.crossed(x, x[:, :3], ask)


def made_up(n=40, modules=8, held=10, seed=0):
    """Single targets of modules, whose observed and predicted responses say which; guides of two kinds; features
    without information."""
    rng = np.random.default_rng(seed)
    module = np.arange(n) % modules
    actions = pd.DataFrame(
        dict(perturbation=[f"H{i}+ctrl" for i in range(n)],
             condition=[f"H{i}+ctrl" for i in range(n)],
             targets=[(f"H{i}", ) for i in range(n)],
             mode="crispri",
             n_cells=10,
             part=np.where(np.arange(n) >= n - held, "test", "train")))
    spaces = {
        "features": rng.normal(size=(n, 6)), "action latents": rng.normal(size=(n, 6)),
        "predicted responses": 3*np.eye(modules)[module] + 5, "observed responses":
        np.eye(modules)[module] + .05*rng.normal(size=(n, modules))
    }
    return g.ActionSpaces(actions, spaces), module


def test_pathway_table_finds_what_is_planted_and_nothing_in_noise(screen):
    model, adata, split, *_ = screen
    spaces, module = made_up()
    relation = label_relation(pd.Series(module, [f"H{i}" for i in range(40)]))
    at = g.pathway_table(model, adata, split, spaces, relation, k_actions=3,
                         n_permutations=99).set_index(["question", "space"])
    held = "held-out targets among training targets"
    assert at.loc[("genes", "gene embeddings"),
                  "note"].startswith("left out: of 60 items 0 are related")  # H0 is no gene of these data
    for name in ("predicted responses", "observed responses"):
        assert at.loc[("targets", name), "knn"] == pytest.approx(at.loc[("targets", name), "knn_best"]) == 1
    assert at.loc[(held, "predicted, among observed responses"),
                  "knn"] == pytest.approx(1) and at.loc[(held, "predicted, among observed responses"),
                                                        "knn_p"] == .01
    assert at.loc[(held, "features"), "n_items"] == 10 and at.loc[(held, "features"), "n_answer"] == 30
    for question in ("targets", held):
        assert at.loc[(question, "features"), "knn_low"] <= at.loc[(question, "features"),
                                                                   "knn"] <= at.loc[(question, "features"),
                                                                                    "knn_high"]
    dealt = g.ActionSpaces(
        spaces.actions, {k: v[np.random.default_rng(1).permutation(40)] for k, v in spaces.spaces.items()})
    assert g.pathway_table(model, adata, split, dealt, relation, k_actions=3,
                           n_permutations=99).query("question == 'targets'")["knn_p"].gt(.01).all()


def test_mechanisms_that_a_screen_does_not_have_are_left_out_by_name(screen):
    spaces, _ = made_up()
    table = g.mechanism_table(spaces, spaces, n_permutations=20)
    assert table["note"].str.startswith("left out").all()
    assert set(table["note"]) == {
        "left out: none of 40 perturbations shares it with another",
        "left out: all 40 perturbations share it (crispri)"
    }


def test_mechanisms_are_found_where_they_are():
    spaces, module = made_up()
    mode = np.arange(40) % 2
    of = g.ActionSpaces(
        spaces.actions.assign(mode=np.array(["crispri", "crispra"])[mode]),
        {"observed responses": np.eye(2)[mode] + .01*np.random.default_rng(0).normal(size=(40, 2))})
    targets = [("A",), ("B",), ("C",), ("D",), ("A", "B"), ("C", "D")]
    pairs = g.ActionSpaces(
        pd.DataFrame(
            dict(perturbation=list("abcdef"),
                 condition=list("abcdef"),
                 targets=targets,
                 mode="x",
                 n_cells=1,
                 part="test")),
        {
            "sum":
            np.array([[1., 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], [1, 1, 0, 0], [0, 0, 1, 1]])
        })
    guides = g.ActionSpaces(
        pd.DataFrame(
            dict(perturbation=[f"g{i}" for i in range(12)],
                 condition=[f"c{i//2}" for i in range(12)],
                 targets=[(f"c{i//2}", ) for i in range(12)],
                 mode="x",
                 n_cells=1,
                 part="test")), {"x": np.eye(6)[np.arange(12) // 2]})
    modes = g.mechanism_table(guides, of, n_permutations=99).set_index("question")
    assert modes.loc["guides of one target", "knn"] == pytest.approx(1) and modes.loc[
        "guides of one target", "knn_p"] == .01 and modes.loc["guides of one target",
                                                              "knn_chance"] == pytest.approx(1/11)
    assert modes.loc["one mode of action",
                     "knn"] == pytest.approx(1) and modes.loc["one mode of action",
                                                              "knn_chance"] == pytest.approx(19/39)
    members = g.mechanism_table(
        guides, pairs, k=2, n_permutations=20).set_index("question").loc["a combination and its members"]
    assert members["knn"] == pytest.approx(
        1) and members["n_items"] == 2 and members["n_answer"] == 4 and members["knn_chance"] == .5


def test_each_mode_of_a_target_is_a_perturbation_of_its_own():
    frame = pd.DataFrame(
        dict(perturbation=["A|1", "A|2", "A|3", "B"],
             condition=["A+ctrl"]*3 + ["B+ctrl"],
             targets=[("A", )]*3 + [("B", )],
             mode=["crispri", "crispri", "crispra", "crispri"],
             n_cells=[1, 3, 5, 2],
             part="test"))
    merged = g._merged(frame, {"x": np.array([[0.], [4], [7], [1]])})
    assert merged.actions["perturbation"].tolist() == [
        "A+ctrl|crispra", "A+ctrl|crispri", "B+ctrl"
    ] and merged.spaces["x"].ravel().tolist() == [7, 3, 1]
    single, targets = merged.singles()
    assert targets == ["A", "B"] and single.actions["mode"].unique().tolist() == [
        "crispri"
    ] and single.spaces["x"].ravel().tolist() == [3, 1]
    with pytest.raises(ValueError, match="'A' is targeted by several perturbations of one mode"):
        g.ActionSpaces(frame, {"x": np.zeros((4, 1))}).singles()
    modes = g.ActionSpaces(
        pd.DataFrame(
            dict(perturbation=list("abcdef"),
                 condition=["A", "A", "B", "B", "C", "C"],
                 targets=[("A", )]*6,
                 mode=["x", "y"]*3,
                 n_cells=1,
                 part="test")), {"x": np.eye(3)[[0, 0, 1, 1, 2, 2]]})
    found = g.mechanism_table(modes, modes, n_permutations=20).set_index("question")["note"]
    assert found["guides of one target"].startswith(
        "left out: none of 6") and found["one target in several modes"] == ""


def test_module_similarity_is_empty_without_planted_modules(screen):
    _, adata, *_ = screen
    spaces = g.action_spaces(screen, n_cells=2, progress=False)
    found = g.module_similarity(adata, spaces)
    assert set(found) == set(spaces.spaces) and all(s.shape == (4, 4) for s in found.values())
    bare = adata.copy()
    del bare.uns["truth"]
    assert g.module_similarity(bare, spaces) == {}


def test_released_pathways_ask_the_released_questions(screen, tmp_path):
    "Genes and guides by the first set of their gene, held-out guides by their mean Δ; random numbers beside each."
    model, adata, split, actions, table = screen
    answers = predictions(screen, progress=False)
    found = released_pathways(model, adata, actions, table, [answers], seed=1)
    truth = dict(zip(adata.uns["truth"]["gene"].astype(str), adata.uns["truth"]["module"].astype(str)))
    by = found.set_index(["question", "space"])
    genes = released_neighbours(gene_embeddings(model), [truth[x] for x in adata.var_names], 10)
    assert by.loc[("genes", "gene embeddings"), ["accuracy", "n_items"]].tolist() == [genes["accuracy"], 60]
    guides = [i for i in range(len(table)) if not table.is_control[i] and len(table.targets[i]) == 1]
    latents = g.action_latents(model, actions.take(np.array(guides)))
    latents = released_neighbours(latents, [truth[table.targets[i][0]] for i in guides], 5)
    assert by.loc[("guides", "action latents"), "accuracy"] == pytest.approx(latents["accuracy"])
    delta = np.stack([answers.cell_delta[answers.group == i].mean(0) for i in range(len(answers.groups))])
    single = [c.endswith("+ctrl") for c in answers.groups["condition"]]
    ratio = released_ratio(delta[single], [truth[c.split("+")[0]] for c in answers.groups["condition"][single]])
    assert by.loc[("held-out responses", "biojepa"), "ratio"] == pytest.approx(ratio["ratio"], rel=1e-4)
    assert {"released run, KEGG", "random numbers"} <= set(found.query("question == 'guides'")["space"])
    assert released_labels(adata, tmp_path/"pairs.csv") == {}
    assert set(released_labels(adata).values()) == set(truth.values())
    lines = [f"{name}\t\t" + "\t".join(adata.var_names[i:i + 20]) for name, i in (("b", 10), ("a", 0))]
    (tmp_path/"s.gmt").write_text("\n".join(lines))
    assert released_labels(adata, tmp_path/"s.gmt")[adata.var_names[15]] == "b"
    without = released_pathways(model, adata, actions, table, [answers], tmp_path/"pairs.csv")
    assert "no sets of 15 to 300" in without.note[0]
