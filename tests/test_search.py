"Searching for actions: many actions from one context, energies, rankings, recovery, interrupted screens."
import os
import signal
import time

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from training_cases import alive, in_child, small_data

from biojepa.actions.action_tokens import action_batch
from biojepa.actions.vocabulary import ActionTable
from biojepa.config import ModelConfig
from biojepa.data.batches import ActionBatch, dense_rows, row_source
from biojepa.evaluate.retrieval import retrieval_table
from biojepa.explore import screen
from biojepa.explore.screen import Blocks, Source, pair_actions, ranking, screen_energies
from biojepa.explore.search import optimise_action, rank_actions, recovered
from biojepa.explore.states import Measure, TargetState, measure_of, target_state, wanted_states
from biojepa.model.biojepa import BioJEPA, Context
from biojepa.model.saving import Pretrained, save_pretrained
from biojepa.predict.many import predict_many, predict_naively, time_forms
from biojepa.predict.model import Subject

G = 40
torch.set_num_threads(1)


def small(std=.1, **switches):
    "A model whose actions have effects, without training."
    torch.manual_seed(0)
    sizes = dict(n_genes=G,
                 d_model=8,
                 n_heads=2,
                 n_encoder_layers=1,
                 n_masked_predictor_layers=1,
                 n_predictor_layers=2,
                 d_action=12,
                 d_mode=4,
                 d_chemical=4,
                 d_protein=24,
                 d_dna=20)
    ours = dict(predicts="change", intervenes=True, initial_values="fan_in")
    model = BioJEPA(ModelConfig(**(sizes | ours | switches))).eval()
    nn.init.normal_(model.predictor.mean.weight, std=std)
    for p in model.composer.film.parameters(): nn.init.normal_(p, std=.1)
    if model.config.intervenes: model.intervention[0, 0] = .2
    return model


@pytest.fixture(scope="module")
def data():
    data = small_data()
    table = ActionTable.from_anndata(data["adata"])
    return data["adata"], data["split"], table, action_batch(table,
                                                             data["features"],
                                                             genes=data["adata"].var_names)


@pytest.fixture(scope="module")
def model(): return small()


def controls(adata): return adata[adata.obs.condition == "ctrl"]


def source(adata, n=5):
    cells = controls(adata)
    return Source(dense_rows(row_source(cells), np.arange(n)),
                  torch.from_numpy(cells.obs.log_library_size.to_numpy(np.float32)[:n]))


def planted(model, adata, table, actions, rows):
    "States that the model itself says these actions lead to."
    x, library = source(adata, controls(adata).n_obs)
    ends = predict_many(model,
                        Context(model, x, library),
                        actions.take(torch.tensor(rows)),
                        relative=True).mean(1)
    return {table.perturbation[r]: TargetState(end[None].clone(), True, 1) for r, end in zip(rows, ends)}


@pytest.mark.parametrize("switches", [
    dict(), dict(intervenes=False), dict(predicts="latent", intervenes=False), dict(n_predictor_layers=1),
    dict(n_predictor_layers=3, value_embedding="offset"), dict(n_heads=1)])
@pytest.mark.parametrize("n_tokens", [1, 2])
def test_many_actions_are_the_models_own(data, switches, n_tokens):
    adata, _, _, actions = data
    model, (x, library) = alive(small(**switches)), source(adata)
    some = ActionBatch(*(t if t is None else t[:9, :n_tokens].clone() for t in actions))
    some.present[1, 0] = False      # a missing token, or no token at all
    naive = predict_naively(model, x, library, some)
    context = Context(model, x, library)
    torch.testing.assert_close(predict_many(model, context, some), naive, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(predict_many(model, context, some, relative=True),
                               naive - context.h,
                               atol=2e-5,
                               rtol=1e-4)
    assert naive.std(0).max() > 1e-2     # actions do differ


def test_inputs_are_left_as_they_were(data, model):
    adata, _, _, actions = data
    x, library = source(adata)
    context = Context(model, x, library)
    before = [t.clone() for t in (context.x, context.h, context.z.x, actions.features)
              ] + [p.detach().clone() for p in model.parameters()]
    first, second = (predict_many(model, context, actions) for _ in range(2))
    assert torch.equal(first, second)
    for a, b in zip(before, [context.x, context.h, context.z.x, actions.features, *model.parameters()]):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["l1", "mse"])
def test_energy_is_that_of_the_model(data, kind):
    adata, _, table, actions = data
    model, (x, library) = small(latent_loss=kind), source(adata)
    outcome = adata[adata.obs.condition == table.condition[3]][:4]
    state = target_state(model, outcome, each=True)
    assert state.latent.shape == (4, G, 8) and not state.relative
    y = dense_rows(row_source(outcome), np.arange(4))
    size = torch.from_numpy(outcome.obs.log_library_size.to_numpy(np.float32))
    energy = screen_energies(model, Source(x, library), actions, [state], progress=False)
    for p in (0, 3, 7):
        with torch.no_grad():
            by_hand = torch.stack([
                model.energy(x, actions.take(torch.full((5, ), p)), y[[k]*5], library, size[[k]*5])
                for k in range(4)
            ]).mean(0)
        np.testing.assert_allclose(energy[1 + p, :, 0], by_hand, rtol=1e-4)
    h = model.teacher(x, library).genes()
    nothing = (h[:, None] - state.latent[None]).abs() if kind == "l1" else (h[:, None] -
                                                                            state.latent[None]).square()
    np.testing.assert_allclose(energy[0, :, 0], nothing.mean((1, 2, 3)), rtol=1e-4)


def test_states_of_every_kind_in_one_screen(data, model):
    adata, _, table, actions = data
    x, library = source(adata)
    cells = adata[adata.obs.condition == table.condition[3]]
    kinds = [
        target_state(model, cells),
        target_state(model, cells, controls(adata)),
        target_state(model, cells, each=True),
        target_state(model, cells, controls(adata), each=True)
    ]
    assert [s.relative for s in kinds] == [False, True, False, True]
    torch.testing.assert_close(kinds[0].latent - target_state(model, controls(adata)).latent,
                               kinds[1].latent,
                               atol=1e-6,
                               rtol=0)
    together = screen_energies(model, Source(x, library), actions, kinds, progress=False)
    for i, s in enumerate(kinds):
        np.testing.assert_allclose(together[..., i],
                                   screen_energies(model, Source(x, library), actions, [s], progress=False)[..., 0],
                                   rtol=1e-5)


def test_batches_of_cells_and_actions_do_not_matter(data, model):
    adata, _, table, actions = data
    cells = source(adata, 13)
    state = target_state(model, adata[adata.obs.condition == table.condition[3]], controls(adata))
    whole, *others = (screen_energies(model, cells, actions, [state], blocks=b, progress=False)
                      for b in (Blocks(batch_size=1000), Blocks(None, 3, 4), Blocks(None, 64, 13), Blocks(None, 1, 32)))
    for other in others: np.testing.assert_allclose(other, whole, rtol=1e-4)


def test_only_the_named_genes_count(data, model):
    adata, _, table, actions = data
    x, library = source(adata)
    state = target_state(model, adata[adata.obs.condition == table.condition[3]], controls(adata))
    some = torch.tensor([1, 5, 8])
    moved = predict_many(model, Context(model, x, library), actions, relative=True)[:, :, some]
    energy = screen_energies(model, Source(x, library), actions, [state], Measure(genes=some), progress=False)
    np.testing.assert_allclose(energy[1:, :, 0], (moved - state.latent[0, some]).abs().mean((2, 3)), rtol=1e-4)
    options = dict(n_cells=5, progress=False)
    assert not rank_actions(
        model, controls(adata), state, actions, table, genes=list(
            adata.var_names[[1, 5, 8]]), **options).energy.equals(
                rank_actions(model, controls(adata), state, actions, table, **options).energy)


@pytest.mark.parametrize("switches", [
    dict(), dict(readout="per_gene", latent_loss="mse"), dict(intervenes=False),
    dict(predicts="latent", intervenes=False)])
@pytest.mark.parametrize("space", ["latent", "expression"])
@pytest.mark.parametrize("relative", [True, False])
@torch.inference_mode()
def test_the_ranking_is_that_of_a_naive_loop(data, switches, space, relative):
    """Each action, and each pair, encodes the cells again, token by token, from where its own intervention leaves
    them."""
    adata, _, table, actions = data
    model, cells = small(**switches), controls(adata)[:6]
    state = target_state(model, adata[adata.obs.condition == table.condition[3]],
                         controls(adata) if relative else None)
    found = rank_actions(model,
                         cells,
                         state,
                         actions,
                         table,
                         pairs=3,
                         space=space,
                         n_cells=None,
                         progress=False).set_index("perturbation")
    rows = np.flatnonzero(~table.is_control)
    best = found[~found.index.str.contains(" & ")].drop_duplicates("condition").index[:3]
    pairs, names = pair_actions(actions, table, np.sort(pd.Index(table.perturbation).get_indexer(best)))
    x, library = source(cells, 6)
    h = model.teacher(x, library, None, False).genes()
    seen = (lambda t: t) if space == "latent" else (lambda t: model.readout(t) - model.readout.linear.bias)
    apart = (lambda t: t.abs()) if model.config.latent_loss == "l1" else (lambda t: t.square())
    far = lambda end: apart(seen(end - h if relative else end) - seen(state.latent)).flatten(1).mean(1).numpy()
    naive = {
        t.perturbation[r]: far(end)
        for of, t, some in ((actions, table, rows), (pairs, names, range(len(names))))
        for r, end in zip(some, predict_naively(model, x, library, of.take(torch.tensor(some))))
    }
    assert set(naive) == set(found.index) and len(naive) > len(rows)
    by_hand = pd.DataFrame(naive).T.loc[found.index]
    np.testing.assert_allclose(found.energy, by_hand.mean(axis=1), rtol=2e-4)
    np.testing.assert_allclose(found.nothing, far(h).mean(), rtol=2e-4)
    np.testing.assert_allclose(found.gain, 1 - by_hand.mean(axis=1)/far(h).mean(), atol=2e-4)
    np.testing.assert_allclose(found.nearer, (by_hand < far(h)).mean(axis=1), atol=.2)


@torch.inference_mode()
def test_expression_is_what_the_readout_says(data, model):
    adata, _, table, actions = data
    x, library = source(adata)
    outcome = adata[adata.obs.condition == table.condition[3]][:4]
    state, some = target_state(model, outcome, each=True), torch.tensor([1, 5, 8])
    measure = measure_of(model, "expression", some)
    energy = screen_energies(model, Source(x, library), actions, [state], measure, progress=False)
    ends = model.readout(predict_many(model, Context(model, x, library), actions).flatten(0, 1))
    wanted = model.readout(state.latent)
    by_hand = (ends[:, None, some] - wanted[None, :, some]).abs().mean((1, 2)).unflatten(0, (-1, 5))
    np.testing.assert_allclose(energy[1:, :, 0], by_hand, rtol=1e-3)


def test_ranking_by_hand():
    table = ActionTable.from_conditions(["A", "B", "C"])
    energy = np.array([[2., 4.], [1., 1.], [3., 6.],
                       [1., 3.]])[..., None].astype(np.float32)  # nothing, A, B, C in two cells
    found = ranking(energy, table, ["wanted"]).set_index("condition")
    assert found.index.tolist() == ["A+ctrl", "C+ctrl", "B+ctrl"] and found["rank"].tolist() == [1, 2, 3]
    np.testing.assert_allclose(found.gain, [2/3, 1/3, -.5])
    np.testing.assert_allclose(
        found.error, [np.std([1/3, 1], ddof=1)/np.sqrt(2), 0,
                      np.std([-1/3, -2/3], ddof=1)/np.sqrt(2)],
        atol=1e-12)
    np.testing.assert_allclose(found.nearer, [1, 1, 0])
    np.testing.assert_allclose(found["gain"], 1 - found.energy/found.nothing)
    tied = ranking(energy[[0, 1, 1, 2]], table, ["wanted"])
    assert tied["rank"].tolist() == [1.5, 1.5, 3] and tied.nothing.eq(3).all()


def test_planted_actions_come_first(data, model):
    adata, _, table, actions = data
    rows = [r for r in range(len(table)) if not table.is_control[r]]
    states = planted(model, adata, table, actions, rows)
    found = rank_actions(model, controls(adata), states, actions, table, n_cells=None, progress=False)
    places = recovered(found, by="perturbation")
    assert (places["rank"] == 1).all() and (places.nearest == places.label).all() and (places.n_candidates
                                                                                       == len(rows)).all()
    assert retrieval_table(places, [1]).set_index("metric").loc["recall@1", "mean"] == 1


def test_shuffled_states_are_found_by_chance(data):
    rng, names = np.random.default_rng(0), [f"G{i}+ctrl" for i in range(400)]
    found = pd.DataFrame(
        dict(target=np.repeat(names, 400),
             condition=np.tile(names, 400),
             perturbation=np.tile(names, 400),
             energy=rng.random(400*400),
             n_cells=5))
    table = retrieval_table(recovered(found), [1, 10], level=.999).set_index("metric")
    for m in ("MRR", "recall@10", "PDS", "rank"):
        assert table.loc[m, "chance_low"] <= table.loc[m, "mean"] <= table.loc[m, "chance_high"], m
    constant = recovered(found.assign(energy=1.))
    assert (constant["rank"] == 200.5).all()    # ties are chance


def test_guides_of_a_target_are_one_candidate():
    found = pd.DataFrame(
        dict(target="A+ctrl",
             condition=["B+ctrl", "A+ctrl", "A+ctrl", "C+ctrl"],
             perturbation=["B", "A|1", "A|2", "C"],
             energy=[.1, .5, .2, .3],
             n_cells=3))
    place = recovered(found).iloc[0]
    assert (place["rank"], place.n_candidates, place.nearest) == (2, 3, "B+ctrl")
    assert recovered(found[found.condition != "B+ctrl"])["rank"].item() == 1 and recovered(
        found, among=["A+ctrl", "C+ctrl"]).n_candidates.item() == 2


def test_pairs_have_the_tokens_of_both(data, model):
    adata, _, table, actions = data
    rows = np.flatnonzero(~table.is_control)[:5]
    both, names = pair_actions(actions, table, rows)
    expected = [(a, b) for i, a in enumerate(rows) for b in rows[i + 1:]
                if table.targets[a] != table.targets[b]]
    assert len(names) == len(expected) == len(both.present)
    for q, (a, b) in enumerate(expected):
        assert set(names.targets[q]) == {*table.targets[a], *table.targets[b]
                                         } and names.condition[q] == "+".join(sorted(names.targets[q]))
        assert torch.equal(both.features[q], torch.cat([
            actions.features[a], actions.features[b]
        ])) and both.genes[q].tolist() == [*actions.genes[a].tolist(), *actions.genes[b].tolist()]
    state = planted(model, adata, names, both, [len(names) - 1])
    found = rank_actions(model,
                         controls(adata),
                         state,
                         *pair_actions(actions, table, rows),
                         n_cells=None,
                         progress=False)
    assert found.perturbation[0] == names.perturbation[-1]
    more = rank_actions(model, controls(adata), state, actions, table, pairs=4, n_cells=None, progress=False)
    assert more.perturbation.str.contains(
        " & ").sum() == 6 and more.energy.is_monotonic_increasing and more.perturbation.is_unique


def test_run_folder_pretrained_and_model_agree(data, model, tmp_path):
    adata, _, table, actions = data
    state = target_state(model, adata[adata.obs.condition == table.condition[3]], controls(adata))
    options = dict(n_cells=5, progress=False)
    expected = rank_actions(model, controls(adata), state, actions, table, **options)
    save_pretrained(model, tmp_path/"model", adata.var_names)
    for given in (tmp_path/"model", Pretrained(model, list(adata.var_names), [])):
        pd.testing.assert_frame_equal(
            rank_actions(given, controls(adata), state, actions, table, **options), expected)
    other_order = controls(adata)[:, ::-1]
    pd.testing.assert_frame_equal(
        rank_actions(tmp_path/"model", other_order, state, actions, table, **options), expected)
    mean = rank_actions(model,
                        controls(adata),
                        adata[adata.obs.condition == table.condition[3]],
                        actions,
                        table,
                        reference=controls(adata),
                        **options)
    pd.testing.assert_frame_equal(mean, expected, rtol=1e-3)


def test_a_killed_screen_goes_on(data, model, tmp_path):
    adata, _, table, actions = data
    state = target_state(model, adata[adata.obs.condition == table.condition[3]], controls(adata))
    options, kept = dict(n_cells=5, progress=False), Blocks(tmp_path/"kept", size=4)
    def screened(model=model, **changed):
        return rank_actions(model, controls(adata), state, actions, table, **(options | dict(folder=kept) | changed))
    whole, slow = screened(pairs=3, folder=Blocks(size=4)), screen._block_energies
    def dawdling(*a):
        time.sleep(.05)
        return slow(*a)
    screen._block_energies = dawdling
    try: child = in_child(lambda: screened(pairs=3))
    finally: screen._block_energies = slow
    until = time.time() + 30
    while len(list((tmp_path/"kept").glob("energy-*.npy"))) < 2 and time.time() < until: time.sleep(.01)
    os.kill(child, signal.SIGKILL); os.waitpid(child, 0)
    done = sorted((tmp_path/"kept").glob("energy-*.npy"))
    assert 2 <= len(done) < 6
    times = {p: p.stat().st_mtime_ns for p in done}
    pd.testing.assert_frame_equal(screened(pairs=3), whole)
    assert {p: p.stat().st_mtime_ns for p in done} == times and (tmp_path/"kept"/"pairs").is_dir()
    for what, other in dict(source=dict(seed=1),
                            genes=dict(genes=list(adata.var_names[:3])),
                            space=dict(space="expression"),
                            block=dict(folder=kept._replace(size=5))).items():
        with pytest.raises(ValueError, match=f"differs in .*{what}"): screened(**other)
    with pytest.raises(ValueError, match="differs in model"): screened(small(std=.2))
    (tmp_path/"kept"/"screen.json").write_text("{")
    with pytest.raises(ValueError, match="screen.json: not readable"): screened(folder=tmp_path/"kept")


def test_wanted_states_are_changes_against_the_controls_of_their_batches(data, model):
    adata, split, table, actions = data
    subject = Subject(model, adata, split, actions, table)
    states, about = wanted_states(subject, min_cells=1, progress=False)
    assert len(states) == 12 and about.part.value_counts().to_dict() == dict(
        train=8, val=2, test=2) and about.part.tolist()[:2] == ["test", "test"]
    obs, name = adata.obs, about.condition[0]
    h = model.teacher(dense_rows(row_source(adata), np.arange(adata.n_obs)),
                      torch.from_numpy(obs.log_library_size.to_numpy(np.float32))).genes()
    own = np.flatnonzero(obs.condition == name)
    before = torch.stack([
        h[np.flatnonzero((obs.condition == "ctrl") & (obs.batch == obs.batch.iloc[i]))].mean(0) for i in own
    ]).mean(0)
    torch.testing.assert_close(states[name].latent[0], h[own].mean(0) - before, atol=1e-5, rtol=1e-4)
    few, _ = wanted_states(subject, n_states=3, min_cells=1, progress=False)
    assert list(few) == list(states)[:3]
    with pytest.raises(ValueError, match="no condition has 1000 cells"):
        wanted_states(subject, min_cells=1000)
    with pytest.raises(ValueError, match="no control cell of 'liver'"):
        wanted_states(subject, cell_type="liver")


@pytest.mark.parametrize("space", ["latent", "expression"])
@pytest.mark.parametrize("switches", [
    dict(intervenes=False), dict(predicts="latent", intervenes=False, latent_loss="mse")])
def test_gradient_finds_a_planted_action(data, switches, space):
    adata, _, table, actions = data
    model, row = small(**switches), int(np.flatnonzero(~data[2].is_control)[0])
    name = table.perturbation[row]
    state = planted(model, adata, table, actions, [row])[name]
    before = [p.detach().clone() for p in model.parameters()]
    searched = optimise_action(model,
                               controls(adata),
                               state,
                               actions,
                               table,
                               space=space,
                               steps=150,
                               pull=0.,
                               n_cells=12,
                               progress=False)
    assert searched.nearest.condition[0] == table.condition[row] and searched.nearest.cosine[0] > .7
    assert searched.history.gain.iloc[-1] > searched.history.gain.iloc[0] and searched.history.gain.max() > .8
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, model.parameters()))
    at_once = optimise_action(model,
                              controls(adata),
                              state,
                              actions,
                              table,
                              space=space,
                              start=name,
                              steps=0,
                              n_cells=None,
                              progress=False)
    assert at_once.nearest.perturbation[0] == name and abs(at_once.nearest.distance[0]) < 1e-4
    assert abs(at_once.nearest.gain[0] - at_once.nearest.gain.iloc[-1]) < 1e-4


@pytest.mark.parametrize(
    "switches", [dict(), dict(intervenes=False),
                 dict(predicts="latent", intervenes=False)])
def test_gains_of_a_search_are_those_of_the_screen(data, switches):
    "What an action gains is one number, however it is asked; with `intervenes` the targeted gene is part of it."
    adata, _, table, actions = data
    model, cells = small(**switches), controls(adata)
    wanted = target_state(model, adata[adata.obs.condition == table.condition[3]], cells)
    name = table.perturbation[int(np.flatnonzero(~table.is_control)[4])]
    options = dict(n_cells=None, progress=False)
    screen = rank_actions(model, cells, wanted, actions, table, **options).set_index("perturbation")
    searched = optimise_action(model,
                               cells,
                               wanted,
                               actions,
                               table,
                               start=name,
                               steps=0,
                               n_nearest=12,
                               **options)
    real = searched.nearest[:-1].set_index("perturbation")
    assert len(real) == 12 and real.gain.std() > 1e-3
    np.testing.assert_allclose(real.energy, screen.energy[real.index], rtol=1e-4)
    np.testing.assert_allclose(real.gain, screen.gain[real.index], atol=1e-4)
    assert abs(searched.history.gain[0] - screen.gain[name]) < 1e-4     # where the search begins, too
    if model.config.intervenes:     # without the targeted gene the gains would be others
        blind = small(**switches)
        blind.intervention[0] = torch.tensor([1., 0.])
        other = rank_actions(blind, cells, wanted, actions, table, **options).set_index("perturbation")
        assert (other.gain[real.index] - real.gain).abs().max() > 1e-2


def test_pull_keeps_the_search_among_real_actions(data, model):
    adata, _, table, actions = data
    state = target_state(model, adata[adata.obs.condition == table.condition[3]], controls(adata))
    far, near = (optimise_action(model,
                                 controls(adata),
                                 state,
                                 actions,
                                 table,
                                 steps=40,
                                 pull=p,
                                 progress=False).history.distance.iloc[-1] for p in (0., 10.))
    assert near < .3*far


def test_what_is_refused(data, model):
    adata, _, table, actions = data
    state = target_state(model, adata[adata.obs.condition == table.condition[3]], controls(adata))
    cells = controls(adata)
    refused = {
        "actions, table: missing":
        lambda: rank_actions(model, cells, state), "found 26 rows|found 25 rows":
        lambda: rank_actions(model, cells, state, actions, table.select([1])), "found no cell":
        lambda: rank_actions(model, cells, adata[:0], actions, table), "found 39 genes":
        lambda: rank_actions(model, cells[:, 1:], state, actions, table), "no column 'log_library_size'":
        lambda: target_state(model, _without(cells)), "n_cells: found 0":
        lambda: rank_actions(model, cells, state, actions, table, n_cells=0), "target_state: found str":
        lambda: rank_actions(model, cells, "KLF1", actions, table), "empty dict":
        lambda: rank_actions(model, cells, {}, actions, table), "space: found 'genes'":
        lambda: rank_actions(model, cells, state, actions, table, space="genes"), "only controls":
        lambda: rank_actions(model, cells, state,
                             actions.take(torch.from_numpy(np.flatnonzero(table.is_control))),
                             table.select(np.flatnonzero(table.is_control))), "make no pair":
        lambda: pair_actions(actions, table, [1]), "already are":
        lambda: rank_actions(
            model, cells, state._replace(latent=state.latent*0), actions, table, progress=False),
        "of which NOBODY unknown":
        lambda: rank_actions(model, cells, state, actions, table, genes=["NOBODY"]), "by: found 'guide'":
        lambda: recovered(pd.DataFrame(), by="guide"), "call prepare":
        lambda: target_state(model, _raw(cells)), "is a wanted state but no candidate":
        lambda: recovered(rank_actions(model, cells, state, actions, table, progress=False))
    }
    for message, call in refused.items():
        with pytest.raises(ValueError, match=message): call()


def _without(cells):
    cells = cells.copy()
    del cells.obs["log_library_size"]
    return cells


def _raw(cells):
    cells = cells.copy()
    cells.uns["biojepa"] = dict(cells.uns["biojepa"], expression_space="counts")
    return cells


def test_one_context_needs_less_arithmetic_than_many():
    torch.manual_seed(0)
    model = BioJEPA(
        ModelConfig(n_genes=300,
                    d_model=32,
                    n_encoder_layers=2,
                    n_predictor_layers=2,
                    n_masked_predictor_layers=1)).eval()
    times = time_forms(model, n_cells=8, n_actions=6, expressed=.4)
    assert times.form.tolist() == [
        "plain", "naive", "one context"
    ] and times.mflop[1] > 2*times.mflop[2]  # 2.36 times; seconds depend on the machine
    assert (times[["milliseconds", "processor_milliseconds"]] > 0).all(axis=None)


def test_a_model_that_adds_nothing_to_its_memory_has_no_gradient_to_follow(data, model):
    adata, _, table, actions = data
    silent = BioJEPA(model.config.changed(predicts="change", delta_from="teacher", n_recalled=2))
    remembered = actions._replace(recall=torch.rand(len(table), 1, 2))
    with pytest.raises(ValueError, match="there is no gradient; rank real actions instead"):
        optimise_action(silent, controls(adata), controls(adata), remembered, table, progress=False)
