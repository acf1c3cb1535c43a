"Small simulated screens with held-out targets, for tests of metrics."
from biojepa.data.datasets import load_dataset
from biojepa.data.preprocess import prepare
from biojepa.data.simulate import simulate_perturb_seq
from biojepa.data.splits import make_split
from biojepa.predict.sets import test_set as template_of


def held_out_screen(spec, n_test):
    "A prepared screen, a split that holds out its first targets, and the template of the test cells."
    screen = simulate_perturb_seq(spec)
    adata = prepare(load_dataset(screen, batch="batch", cell_type="cell_type", guide="guide_id"))
    adata.uns["truth"] = screen.uns["truth"]
    targets = sorted(set(adata.obs["condition"]) - {"ctrl"})
    held_out = dict(train=targets[n_test:], test=targets[:n_test])
    split = make_split(adata, "custom", held_out=held_out, allow_empty_val=True)
    return adata, split, template_of(adata, split)
