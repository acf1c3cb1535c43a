"""A gene that was never in the screen, asked about from a fresh process.

1. It is answered from the relations that were kept with the run, with its reliability and what the answer leans on.
2. A gene without relations gets the train mean and says so, or is an error.
3. The error of the mean is what intervals are made of.
"""
import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from training_cases import OPTIONS, small_data, small_experiment

from biojepa.actions.banks import MissingFeatureError
from biojepa.config import MemoryConfig
from biojepa.predict.anndata import predict
from biojepa.training.run import run_stages

CHANGE = dict(predicts="change", delta_from="teacher", readout="per_gene", intervenes=True, mask_context=False,
              d_protein=128, d_dna=1536, sees_relations=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A run on 8 training targets; relations also name genes that were never perturbed, OUT among them."
    folder, given = tmp_path_factory.mktemp("unseen"), small_data()
    targets = sorted({c.split("+")[0] for c in given["adata"].obs["condition"]} - {"ctrl"})
    rng = np.random.default_rng(0)
    others = [f"N{i}" for i in range(20)]
    pairs = [(a, b) for a in targets for b in rng.choice(others, 4, replace=False)]
    pairs += [("OUT", targets[0]), ("OUT", targets[1]), *[("OUT", b) for _, b in pairs[:4]]]
    pd.DataFrame(pairs, columns=["a", "b"]).to_csv(folder/"relations.csv", index=False)
    experiment = small_experiment(**CHANGE)
    experiment = experiment.changed(memory=MemoryConfig(confidence=0.),
                                    dynamics=experiment.dynamics.changed(target="mean"),
                                    data=experiment.data.changed(relations=str(folder/"relations.csv")))
    made = run_stages(experiment, given["adata"], given["split"], folder/"runs", **OPTIONS)
    given["adata"].write_h5ad(folder/"cells.h5ad")
    return made, folder, targets


def test_the_model_knows_what_relates_measured_genes(run):
    made, _, targets = run
    F = made.model.gene_features.numpy()
    np.testing.assert_allclose(np.linalg.norm(F[made.adata.var_names.isin(targets)], axis=1), 1, atol=1e-3)
    assert not F[~made.adata.var_names.isin(targets)].any() and made.model.config.n_relations == 1


def test_a_gene_outside_the_screen_is_answered_from_a_fresh_process(run):
    made, folder, targets = run
    code = f"""
import json
import anndata
from biojepa.predict import predict
out = predict({str(made.folder/"model")!r}, anndata.read_h5ad({str(folder/"cells.h5ad")!r}),
              ["OUT", "OUT+{targets[0]}", "{targets[0]}"], n_cells=8, progress=False)
columns = ["perturbation", "reliability", "known", "leans_on"]
print(json.dumps(dict(rows=out.obs[columns].values.tolist(), delta=out.layers["delta"].tolist())))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    said = json.loads(ran.stdout.splitlines()[-1])
    (_, sure, known, leans), pair, seen = said["rows"]
    assert known and pair[2] and 0 < sure <= 1 and 0 < seen[1] <= 1
    assert any(leans.startswith(t) for t in targets) and len(leans.split(", ")) == 3
    here = predict(made, made.adata, ["OUT"], n_cells=8, progress=False)
    np.testing.assert_allclose(here.layers["delta"][0], said["delta"][0], atol=1e-5)
    assert not np.allclose(said["delta"][0], said["delta"][2], atol=1e-3)


def test_its_answer_is_the_memorys_where_nothing_else_is_known(run):
    made, _, _ = run
    out = predict(made, made.adata, ["OUT"], n_cells=8, progress=False)
    assert made.settled.share == 0      # two held-out targets cannot confirm anything
    memory = made.memories.answering(out.obs["cell_type"].iloc[0])
    said = memory.answer([("OUT",)])
    np.testing.assert_allclose(out.layers["delta"][0], said.delta[0], atol=1e-5)
    np.testing.assert_allclose(out.layers["error"][0], said.sd[0], atol=1e-6)


def test_a_gene_without_relations_gets_the_train_mean_and_says_so(run):
    made, _, _ = run
    with pytest.warns(UserWarning, match="1 of 1 targets have no diffusion feature and get the mean one: NOWHERE"):
        out = predict(made, made.adata, ["NOWHERE"], n_cells=8, progress=False)
    assert not out.obs["known"].iloc[0] and out.obs["reliability"].iloc[0] == 0
    np.testing.assert_allclose(out.layers["delta"][0], made.memories.of[0].mean, atol=1e-5)
    with pytest.raises(MissingFeatureError, match="NOWHERE"):
        predict(made, made.adata, ["NOWHERE"], missing="error", n_cells=8, progress=False)
    with pytest.raises(ValueError, match="missing: found 'guess'"):
        predict(made, made.adata, ["NOWHERE"], missing="guess", progress=False)


def test_a_finished_run_is_read_with_the_memory_and_the_share_it_began_with(run, monkeypatch):
    "Another machine may round a basis to other signs; what is saved is used."
    made, folder, _ = run
    from biojepa.training import run as module
    turned = module.remember
    def other_signs(*args):
        memories = turned(*args)
        for memory in memories.of:
            memory.basis[:] *= -1
            memory.scores[:] *= -1
        return memories
    monkeypatch.setattr(module, "remember", other_signs)
    monkeypatch.setattr(module, "settle_", lambda *_: pytest.fail("decided twice"))
    again = run_stages(made.experiment, made.adata, made.split, folder/"runs", **OPTIONS)
    assert all(a.equal(b) for a, b in zip(again.model.state_dict().values(), made.model.state_dict().values()))
    np.testing.assert_array_equal(again.actions.recall, made.actions.recall)
