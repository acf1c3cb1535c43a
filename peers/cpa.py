"""CPA, trained from scratch on the cells of a task, answers its questions.

The compositional perturbation autoencoder of cpa-tools, as shipped: its network, its adversary, its training plan,
the best weights by its own metric on the validation cells. What is done here: each question is asked of the control
cells of its line, by the name of its targets or, with --features, by what describes them.

    python peers/cpa.py FOLDER [--features KIND]
"""
import argparse
import contextlib
import json
import resource
import sys
import time
from importlib.metadata import version
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd

HERE = Path(__file__).resolve().parent
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != HERE]     # the package has the name of this script


def arguments():
    "What can be set; where a default is not the package's, its own stands in the help."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("folder", type=Path, help="of the task; the answer goes into a folder below it")
    add("--features", default="", help="kind of features_KIND.csv; left away: a target has an embedding of its own")
    add("--epochs", type=int, default=100, help="over the training cells (package: at most 400)")
    add("--batch", type=int, default=128, help="cells of a batch")
    add("--latent", type=int, default=64, help="width of the latent space (package: 128)")
    add("--width", type=int, default=128, help="of hidden layers (package: 256)")
    add("--layers", type=int, default=2, help="of encoder and decoder (package: 3)")
    add("--pretrain", type=int, default=20, help="epochs without the adversary (package: 0)")
    add("--controls", type=int, default=1000, help="control cells of a line that a question is asked of, at most")
    add("--threads", type=int, default=1, help="of torch")
    add("--seed", type=int, default=0, help="of weights and batches")
    return parser.parse_args()


def cells_and_questions(cells, asked, n_controls, seed):
    "Cells to learn from, then controls under each question: obs perturbation, cell_type, split, question."
    obs = cells.obs.astype(str)
    learned = np.flatnonzero(obs["part"] != "test")
    known = pd.DataFrame(dict(perturbation=obs["targets"].replace("", "ctrl"), cell_type=obs["cell_type"],
                              split=np.where(obs["part"] == "val", "test", "train"), question=-1)).iloc[learned]
    rows, tables, rng = [learned], [known], np.random.default_rng(seed)
    for number, question in enumerate(asked.itertuples()):
        own = np.flatnonzero((obs["part"] == "control") & (obs["cell_type"] == question.cell_type))
        own = rng.permutation(own)[:n_controls]
        rows.append(own)
        tables.append(pd.DataFrame(dict(perturbation=question.targets, cell_type=question.cell_type, split="ood",
                                        question=number), index=np.arange(len(own))))
    obs = pd.concat(tables, ignore_index=True).set_axis([str(i) for i in range(sum(map(len, rows)))])
    return ad.AnnData(cells.X[np.concatenate(rows)].astype(np.float32), obs=obs, var=cells.var)


def embedded(folder, kind, places):
    "A frozen embedding of targets by their features, on one scale; 0 for a control."
    import torch
    table = pd.read_csv(folder/f"features_{kind}.csv", index_col="target")
    table = table[~table.index.duplicated()].set_index(table.index[~table.index.duplicated()].astype(str))
    rows = table.reindex(list(places)).to_numpy(np.float32)
    known = np.isfinite(rows).all(1)
    rows[known] -= rows[known].mean(0)
    rows = np.nan_to_num(rows/np.sqrt(np.square(rows[known]).sum(1).mean()))
    return torch.nn.Embedding.from_pretrained(torch.from_numpy(rows), freeze=True, padding_idx=0), known


def trained(adata, args):
    "The model, and which targets it can tell apart (None: all by name)."
    import cpa
    cpa.CPA.pert_smiles_map = {}    # nobody has a SMILES here
    n_targets = int(adata.obs["perturbation"].str.count(r"\+").max()) + 1
    cpa.CPA.setup_anndata(adata, perturbation_key="perturbation", control_group="ctrl", is_count_data=False,
                          categorical_covariate_keys=["cell_type"], max_comb_len=max(2, n_targets))
    options, known = {}, None
    if args.features:
        options["drug_embeddings"], known = embedded(args.folder, args.features, cpa.CPA.pert_encoder)
        known = dict(zip(cpa.CPA.pert_encoder, known))
    model = cpa.CPA(adata, split_key="split", train_split="train", valid_split="test", test_split="ood",
                    n_latent=args.latent, recon_loss="gauss", doser_type="linear", n_hidden_encoder=args.width,
                    n_layers_encoder=args.layers, n_hidden_decoder=args.width, n_layers_decoder=args.layers,
                    seed=args.seed, **options)
    model.train(max_epochs=args.epochs, use_gpu=False, batch_size=args.batch, save_path=False,
                check_val_every_n_epoch=5, early_stopping_patience=10, enable_progress_bar=False,
                plan_kwargs=dict(n_epochs_pretrain_ae=args.pretrain, n_epochs_verbose=10**6))
    return model, known


def main():
    args, begun, cpu = arguments(), time.time(), time.process_time()
    import torch
    torch.set_num_threads(args.threads)
    task = json.loads((args.folder/"task.json").read_text())
    cells = ad.read_h5ad(args.folder/"cells.h5ad")
    asked = pd.read_csv(args.folder/"questions.csv", dtype=str, keep_default_na=False)
    adata = cells_and_questions(cells, asked, args.controls, args.seed)
    with contextlib.redirect_stdout(sys.stderr):    # the package prints
        model, known = trained(adata, args)
        model.predict(adata, batch_size=1024)
    said = pd.DataFrame(adata.obsm["CPA_pred"]).groupby(adata.obs["question"].to_numpy()).mean()
    mean = np.clip(said.loc[range(len(asked))].to_numpy(np.float32), 0, None)
    name = f"cpa, {args.features}" if args.features else "cpa"
    unknown = [c for c in asked["targets"] if known and not all(known[t] for t in c.split("+"))]
    settings = {k: v for k, v in vars(args).items() if k != "folder"} | dict(
        unknown=unknown, parameters=sum(p.numel() for p in model.module.parameters()),
        cpu_seconds=time.process_time() - cpu)
    answer = ad.AnnData(mean, obs=asked[["condition", "cell_type"]], var=cells.var)
    answer.uns.update(task=task["task"], name=name, package="cpa-tools " + version("cpa-tools"),
                      seconds=time.time() - begun, peak_gb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**20,
                      settings=json.dumps(settings))
    place = args.folder/name.replace(", ", "-")
    place.mkdir(exist_ok=True)
    answer.write_h5ad(place/"answer.part.h5ad")
    (place/"answer.part.h5ad").replace(place/"answer.h5ad")
    print(place/"answer.h5ad")


if __name__ == "__main__": main()
