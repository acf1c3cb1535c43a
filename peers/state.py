"""STATE, trained from scratch on the cells of a task, answers its questions.

The state-transition model of arc-state, as shipped: its network, its loss over sets of cells, its optimiser. What is
done here: sets of cells are drawn as its data module draws them (cells of one condition and line beside control cells
of that line), perturbations are described, the best weights by validation loss are kept.

    python peers/state.py FOLDER [--features KIND]
"""
import argparse
import contextlib
import copy
import io
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
    "What can be set, and what it is in the published configuration."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("folder", type=Path, help="of the task; the answer goes into a folder below it")
    add("--features", default="", help="kind of features_KIND.csv; left away: a target is a dimension of its own")
    add("--steps", type=int, default=2000, help="of the optimiser (published: 400000)")
    add("--cells", type=int, default=32, help="of a set (published: 512)")
    add("--sets", type=int, default=8, help="of a step (published: 16)")
    add("--width", type=int, default=128, help="of a cell in the transformer (published: 768)")
    add("--layers", type=int, default=4, help="of the transformer (published: 8)")
    add("--heads", type=int, default=4, help="of its attention (published: 12)")
    add("--space", default="gene", choices=["gene", "all"], help="output head of the model (published: both are used)")
    add("--lr", type=float, default=5e-4, help="of Adam (published: 1e-4)")
    add("--dropout", type=float, default=.1, help="of encoders and decoder (published: 0.1)")
    add("--every", type=int, default=100, help="steps between two looks at the validation conditions")
    add("--threads", type=int, default=1, help="of torch")
    add("--seed", type=int, default=0, help="of weights and sets")
    return parser.parse_args()


def described(folder, kind, targets):
    "(targets, F) float32, and which targets it describes: own dimensions, or features on one scale."
    if not kind: return np.eye(len(targets), dtype=np.float32), np.ones(len(targets), bool)
    table = pd.read_csv(folder/f"features_{kind}.csv", index_col="target")
    table = table[~table.index.duplicated()]
    known = np.isin(targets, table.index.astype(str))
    rows = table.set_index(table.index.astype(str)).reindex(targets).fillna(0).to_numpy(np.float32)
    rows[known] -= rows[known].mean(0)
    return rows/np.sqrt(np.square(rows[known]).sum(1).mean()), known


class Sets:
    "Sets of cells beside sets of controls, as the model reads them."
    def __init__(self, folder, kind, n_cells, seed):
        cells = ad.read_h5ad(folder/"cells.h5ad")
        self.cells, self.obs, self.n, self.rng = cells, cells.obs.astype(str), n_cells, np.random.default_rng(seed)
        self.asked = pd.read_csv(folder/"questions.csv", dtype=str, keep_default_na=False)
        targets = sorted({t for names in (self.obs["targets"], self.asked["targets"]) for c in names.unique()
                          for t in c.split("+") if t})
        self.place = {t: i for i, t in enumerate(targets)}
        self.rows, self.known = described(folder, kind, np.array(targets, object))
        groups = self.obs.reset_index(drop=True).groupby(["part", "targets", "cell_type"], sort=True).indices
        self.controls = {line: at for (part, _, line), at in groups.items() if part == "control"}
        self.parts = {part: [(t, line, at) for (p, t, line), at in groups.items()
                             if p == part and self.describes(t) and line in self.controls] for part in ("train", "val")}
        self.parts["train"] += [("", line, at) for line, at in self.controls.items()]    # controls stay as they are
        if not self.parts["val"]: self.parts["val"] = self.parts["train"]

    def describes(self, targets):
        "Whether every target of a condition is described."
        return all(self.known[self.place[t]] for t in targets.split("+") if t)

    def action(self, targets):
        "(F,) sum over the targets of a condition; 0 for a control."
        return self.rows[[self.place[t] for t in targets.split("+") if t]].sum(0)

    def values(self, at): return self.cells.X[at].toarray().astype(np.float32)

    def draw(self, groups, rng):
        "A batch: for each group as many of its cells as controls."
        def some(at): return rng.choice(at, self.n, replace=len(at) < self.n)
        return dict(pert_cell_emb=np.concatenate([self.values(some(at)) for _, _, at in groups]),
                    ctrl_cell_emb=np.concatenate([self.values(some(self.controls[line])) for _, line, _ in groups]),
                    pert_emb=np.repeat(np.stack([self.action(t) for t, _, _ in groups]), self.n, axis=0))


def network(sets, args):
    "The model, as its smallest published configuration builds it, at the width asked for."
    from state.tx.models.state_transition import StateTransitionPerturbationModel
    n_genes = sets.cells.n_vars
    backbone = dict(bidirectional_attention=True, max_position_embeddings=args.cells, hidden_size=args.width,
                    intermediate_size=4*args.width, num_hidden_layers=args.layers, num_attention_heads=args.heads,
                    num_key_value_heads=args.heads, head_dim=args.width//args.heads, use_cache=False,
                    attention_dropout=0., hidden_dropout=0., layer_norm_eps=1e-6, pad_token_id=0, bos_token_id=1,
                    eos_token_id=2, tie_word_embeddings=False, rotary_dim=0, use_rotary_embeddings=False)
    with contextlib.redirect_stdout(io.StringIO()):     # the model prints itself
        return StateTransitionPerturbationModel(
            input_dim=n_genes, hidden_dim=args.width, output_dim=n_genes, gene_dim=n_genes, hvg_dim=n_genes,
            pert_dim=sets.rows.shape[1], predict_residual=True, distributional_loss="energy", loss="energy", blur=.05,
            transformer_backbone_key="llama", transformer_backbone_kwargs=backbone, output_space=args.space,
            embed_key="X_hvg", cell_set_len=args.cells, n_encoder_layers=1, n_decoder_layers=1, dropout=args.dropout,
            lr=args.lr, gene_decoder_bool=False, decoder_cfg=None, batch_encoder=False)


def train(model, sets, args):
    "The weights of the lowest validation loss, the step they are from, and the losses."
    import torch
    model.log = lambda *_, **__: None   # there is no trainer to log to
    def batch(groups, rng): return {k: torch.from_numpy(v) for k, v in sets.draw(groups, rng).items()}
    optimiser, losses = model.configure_optimizers(), []
    groups = sets.parts["train"]
    share = np.array([max(1, len(at)//args.cells) for _, _, at in groups], float)   # as many sets as cells fill
    best, kept, at = np.inf, None, 0
    for step in range(1, args.steps + 1):
        model.train()
        chosen = sets.rng.choice(len(groups), args.sets, p=share/share.sum())
        loss = model.training_step(batch([groups[i] for i in chosen], sets.rng), step)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.)
        optimiser.step()
        if step % args.every and step != args.steps: continue
        model.eval()
        fixed = np.random.default_rng(args.seed)
        with torch.no_grad():
            val = np.mean([float(model.validation_step(batch([g], fixed), 0)["loss"]) for g in sets.parts["val"]])
        losses.append((step, float(loss.detach()), float(val)))
        if val < best: best, kept, at = val, copy.deepcopy(model.state_dict()), step
        print(f"step {step}: training loss {losses[-1][1]:.4f}, validation loss {val:.4f}", file=sys.stderr)
    model.load_state_dict(kept)
    return at, losses


def answered(model, sets, args):
    "(Q, G) mean expression: every control cell of a line is predicted under each question once."
    import torch
    model.eval()
    out = []
    for question in sets.asked.itertuples():
        controls = np.random.default_rng(args.seed).permutation(sets.controls[question.cell_type])
        size = args.cells*max(1, len(controls)//args.cells)
        x = torch.from_numpy(sets.values(np.resize(controls, size)))
        action = torch.from_numpy(sets.action(question.targets)).expand(len(x), -1)
        with torch.no_grad(): predicted = model.predict_step(dict(ctrl_cell_emb=x, pert_emb=action), 0)["preds"]
        out.append(predicted.double().mean(0).numpy())
    return np.stack(out)


def train_means(sets):
    "(Q, G) what a question is answered with whose target nothing describes: control plus mean response of training."
    control = {line: sets.values(at).mean(0, dtype=float) for line, at in sets.controls.items()}
    change = [sets.values(at).mean(0, dtype=float) - control[line] for t, line, at in sets.parts["train"] if t]
    return np.stack([control[line] + np.mean(change, 0) for line in sets.asked["cell_type"]])


def main():
    args, begun, cpu = arguments(), time.time(), time.process_time()
    import torch
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    task = json.loads((args.folder/"task.json").read_text())
    sets = Sets(args.folder, args.features, args.cells, args.seed)
    model = network(sets, args)
    best, losses = train(model, sets, args)
    mean = answered(model, sets, args)
    unknown = ~sets.asked["targets"].map(sets.describes).to_numpy()
    if unknown.any(): mean[unknown] = train_means(sets)[unknown]
    name = f"state, {args.features}" if args.features else "state"
    settings = {k: v for k, v in vars(args).items() if k != "folder"} | dict(
        best_step=best, losses=losses, parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        unknown=sorted(sets.asked["condition"][unknown]), cpu_seconds=time.process_time() - cpu)
    answer = ad.AnnData(mean.astype(np.float32), obs=sets.asked[["condition", "cell_type"]],
                        var=pd.DataFrame(index=sets.cells.var_names))
    answer.uns |= dict(task=task["task"], name=name, package="arc-state " + version("arc-state"),
                       seconds=time.time() - begun, peak_gb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**20,
                       settings=json.dumps(settings))
    place = args.folder/name.replace(", ", "-")
    place.mkdir(exist_ok=True)
    answer.write_h5ad(place/"answer.part.h5ad")
    (place/"answer.part.h5ad").replace(place/"answer.h5ad")
    print(place/"answer.h5ad")


if __name__ == "__main__": main()
