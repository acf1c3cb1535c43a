"Feature banks, the cache, k-mers, fingerprints and action tokens, against independent recomputation."
import errno
import hashlib
import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

from biojepa.actions import cache
from biojepa.actions.action_tokens import action_batch
from biojepa.actions.banks import FeatureBank, MissingFeatureError
from biojepa.actions.featurizers import (
    FEATURIZERS, KmerHash, SequenceFeaturizer, clean_sequence, default_width, featurize, featurizer
)
from biojepa.actions.vocabulary import ActionTable, Modality, Mode
from biojepa.core import PATHS
from biojepa.data.conditions import condition_name

RNG = np.random.default_rng(0)
AMINO, BASES = "ACDEFGHIKLMNPQRSTVWY", "ACGT"
spell = lambda letters, n: "".join(RNG.choice(list(letters), n))
PROTEINS = {f"gene{i}": spell(AMINO, n) for i, n in enumerate((30, 250, 80, 120, 30, 400))}


def bank_of(values, keys=("A", "B"), modality=Modality.PROTEIN, **provenance):
    return FeatureBank(keys, np.asarray(values, dtype=float), modality, {"featurizer": "by hand", **provenance})


# ---------------------------------------------------------------- the bank

def test_rows_come_in_the_order_asked_for():
    bank = bank_of([[1, 2], [3, 4]])
    np.testing.assert_array_equal(bank.rows(["B", "A", "B"]), np.float32([[3, 4], [1, 2], [3, 4]]))
    np.testing.assert_array_equal(bank.rows("B"), np.float32([[3, 4]]))
    assert bank.rows([]).shape == (
        0, 2) and bank.values.dtype == np.float32 and len(bank) == 2 and "A" in bank and "C" not in bank


def test_a_missing_key_is_an_error_that_names_it():
    with pytest.raises(MissingFeatureError, match=r"no feature for KLF1, TP53 \(2 of 3 keys\)"):
        bank_of([[1, 2], [3, 4]]).rows(["TP53", "A", "KLF1"])
    assert issubclass(MissingFeatureError, ValueError)


@pytest.mark.parametrize(
    "values,keys,message",
    [
        ([[1, 2], [0, 0]], "AB", "only zeros in B"),
        ([[1, np.nan], [1, 0]], "AB", "NaN or infinite values in A"),
        ([[1, np.inf], [1, 0]], "AB", "infinite values in A"),
        ([[1, 1e300], [1, 0]], "AB", "infinite "
         "values in A"),  # too large for float32
        ([[1, 2], [3, 4]], "AA", "found A more than once"),
        ([[1, 2]], "AB", r"shape \(1, 2\) for 2 keys"),
        ([1, 2], "AB", r"shape \(2,\)")
    ])
def test_bad_tables_are_refused(values, keys, message):
    with pytest.raises(ValueError, match=message): bank_of(values, tuple(keys))


def test_a_bank_cannot_be_edited():
    values = np.ones((2, 2), np.float32)
    bank = bank_of(values)
    values[0] = 5                                                  # the caller's array is his own
    assert bank.values[0, 0] == 1
    with pytest.raises(ValueError, match="read-only"): bank.values[0] = 0
    with pytest.raises(Exception, match="frozen|assign"): bank.keys = ("C",)


def test_save_and_load_keep_every_bit(tmp_path):
    bank = FeatureBank(("Ä", 'a"b'), RNG.normal(size=(2, 7)), Modality.DNA,
                       {"featurizer": "x", "cut": {"Ä": 3}, "weights": None})
    again = FeatureBank.load(bank.save(tmp_path/"deep"/"b.safetensors"))
    np.testing.assert_array_equal(again.values, bank.values)
    assert (again.keys, again.modality, again.provenance) == (bank.keys, bank.modality, bank.provenance)
    with safe_open(tmp_path/"deep"/"b.safetensors", "numpy") as f:
        assert json.loads(f.metadata()["bank"])["provenance"]["featurizer"] == "x"


def test_equal_banks_are_equal_files_and_those_of_before_are_read(tmp_path):
    bank = bank_of([[1, 2], [3, 4]])
    assert len({bank.save(tmp_path/f"{i}.safetensors").read_bytes() for i in range(8)}) == 1
    about = dict(schema="biojepa.FeatureBank/1", keys=json.dumps(bank.keys), modality="PROTEIN",
                 provenance=json.dumps(dict(featurizer="old")))
    save_file({"values": bank.values}, tmp_path/"old.safetensors", metadata=about)
    old = FeatureBank.load(tmp_path/"old.safetensors")
    assert old.keys == bank.keys and old.provenance == dict(featurizer="old")
    np.testing.assert_array_equal(old.values, bank.values)


def test_loading_refuses_what_is_not_a_bank(tmp_path):
    path = bank_of([[1, 2], [3, 4]]).save(tmp_path/"b.safetensors")
    (tmp_path/"half.safetensors").write_bytes(path.read_bytes()[:-5])
    save_file({"values": np.ones((1, 1), np.float32)}, tmp_path/"foreign.safetensors")
    (tmp_path/"pickle.safetensors").write_bytes(b"\x80\x04N.")
    for name, message in {
            "half": "broken safetensors", "foreign": "found schema None", "pickle": "broken safetensors",
            "absent": "no such file"
    }.items():
        with pytest.raises(ValueError, match=f"{name}.safetensors: .*{message}"):
            FeatureBank.load(tmp_path/f"{name}.safetensors")


def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = bank_of([[1, 2], [3, 4]]).save(tmp_path/"b.safetensors")
    def half(part, content):
        with open(part, "wb") as f: f.write(content[:4])
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(OSError, match="cannot write 2 features .No space left on device.*are free.*b.safetensors"):
        bank_of([[5, 5], [5, 5]]).save(path)
    assert FeatureBank.load(path).values[0, 1] == 2 and [p.name
                                                         for p in tmp_path.iterdir()] == ["b.safetensors"]


def test_select():
    bank = bank_of([[1, 2], [3, 4]])
    assert bank.select(["B", "B"]).keys == ("B",)
    with pytest.raises(MissingFeatureError, match="no feature for Z"): bank.select(["B", "Z"])
    with pytest.warns(UserWarning, match="1 of 2 keys have no feature .*dropped: Z"):
        assert bank.select(["Z", "B"], missing="drop").keys == ("B", )
    with pytest.raises(ValueError, match="missing: found 'zero'"): bank.select(["B"], missing="zero")


# ---------------------------------------------------------------- letters

@pytest.mark.parametrize("text,modality,clean", [("mk ta\n", Modality.PROTEIN, "MKTA"),
                                                 ("MKU*", Modality.PROTEIN, "MKU"),
                                                 ("BZXJO", Modality.PROTEIN, "BZXXO"),
                                                 ("acgu", Modality.DNA, "ACGT"),
                                                 ("RYSWKMBDHVN", Modality.DNA, "N"*11)])
def test_one_spelling(text, modality, clean):
    assert clean_sequence(text, modality) == clean


@pytest.mark.parametrize("text,modality,message",
                        [("", Modality.PROTEIN, "TP53: found an empty sequence"),
                         (" \n", Modality.DNA, "TP53: found an empty"), ("*", Modality.PROTEIN, "empty"),
                         (None, Modality.DNA, "TP53: found None"),
                         (float("nan"), Modality.PROTEIN, "TP53: found nan"),
                         ("MK-T", Modality.PROTEIN, "'-' at position 3 of a PROTEIN"),
                         ("M*K", Modality.PROTEIN, "'\\*' at position 2"),
                         ("ACGT*", Modality.DNA, "'\\*' at position 5"),
                         ("MKTA", Modality.DNA, "found 'E'|allowed are ACGTN"),
                         ("CCO", Modality.CHEMICAL, "modality: found")])
def test_bad_letters_are_named(text, modality, message):
    if text == "MKTA": text = "ACGE"
    with pytest.raises(ValueError, match=message): clean_sequence(text, modality, "TP53")


def test_featurize_names_the_bad_sequence():
    with pytest.raises(ValueError, match="gene2: found '7' at position 2"):
        featurize("kmer", {"gene1": "MK", "gene2": "M7"}, cache=False, modality=Modality.PROTEIN)
    for empty in ({}, (), pd.Series(dtype=str)):
        with pytest.raises(ValueError, match="inputs: found .* of length 0"):
            featurize("kmer", empty, cache=False, modality=Modality.PROTEIN)
    with pytest.raises(ValueError, match="inputs: found list of length 1"):
        featurize("kmer", ["MK"], cache=False, modality=Modality.PROTEIN)
    with pytest.raises(ValueError, match="pair: found no sequence"):
        featurize("kmer", {"pair": ()}, cache=False, modality=Modality.DNA)
    with pytest.raises(ValueError, match="inputs: found g more than once"):
        featurize("kmer", pd.Series(["MK", "ML"], ["g", "g"]), cache=False, modality=Modality.PROTEIN)


# ---------------------------------------------------------------- k-mers

def slow_kmer_row(sequence, letters, width):
    "Dictionaries and loops, from the text of the notebook."
    row, start, k = np.zeros(width), 0, 0
    while start < width:
        k, room = k + 1, width - start
        words = ["".join(w) for w in product(letters, repeat=k)]
        exact = len(words) <= room
        dealt = words if exact else sorted(
            words, key=lambda w: hashlib.blake2b(w.encode(), digest_size=16).digest())
        n = len(words) if exact else room
        column = {w: i % n for i, w in enumerate(dealt)}
        counts, share = np.zeros(n), np.zeros(n)
        for w in words: share[column[w]] += 1
        for i in range(len(sequence) - k + 1):
            if (w := sequence[i:i+k]) in column: counts[column[w]] += 1/share[column[w]]
        block = np.log(counts + 1)
        block -= block.mean()
        if counts.max() > counts.min() + 1e-12: row[start:start+len(block)] = block/np.sqrt((block**2).sum())
        start += len(block)
    return row/np.sqrt((row**2).sum())


@pytest.mark.parametrize(
    "modality,letters,sequences",
    [(Modality.PROTEIN, AMINO, [*PROTEINS.values(), "M", "MXXU", "A"*50]),
     (Modality.DNA, BASES, [spell(BASES, 20),
                            spell("ACGTN", 20), "ACGT", "A",
                            spell(BASES, 500)])])
def test_kmer_rows_by_hand(modality, letters, sequences):
    made = KmerHash(modality)
    rows = made.embed(sequences)
    assert rows.shape == (len(sequences), {Modality.PROTEIN: 320, Modality.DNA: 1536}[modality])
    for s, row in zip(sequences, rows):
        np.testing.assert_allclose(row, slow_kmer_row(s, letters, made.width), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-5)


def test_kmer_does_not_depend_on_the_process():
    code = (
        "import hashlib; from biojepa.actions.featurizers import KmerHash, Modality;"
        "print(hashlib.sha256(KmerHash(Modality.PROTEIN).embed(['MKTAYIAKQR']).tobytes()).hexdigest(), "
        "hash('MK'))"
    )
    run = subprocess.run([sys.executable, "-c", code],
                         env=os.environ | {"PYTHONHASHSEED": "12345"},
                         capture_output=True,
                         text=True,
                         check=True)
    there, python_hash = run.stdout.split()
    assert there == hashlib.sha256(KmerHash(Modality.PROTEIN).embed(["MKTAYIAKQR"]).tobytes()).hexdigest()
    assert int(python_hash) != hash("MK")                          # Python's own hash does differ


def test_composition_survives():
    "Proteins of six planted compositions: the nearest neighbour is of the same one, and a linear map reads it off."
    from sklearn.linear_model import RidgeClassifier
    own = (RNG.dirichlet(np.full(20, 0.5), 6) + 1/20)/2
    group = np.repeat(np.arange(6), 20)
    sequences = {
        f"p{i}": "".join(RNG.choice(list(AMINO), RNG.integers(100, 600), p=own[g]))
        for i, g in enumerate(group)
    }
    X = featurize("kmer", sequences, cache=False, progress=False, modality=Modality.PROTEIN).values
    similarity = X @ X.T
    np.fill_diagonal(similarity, -2)
    assert (group[similarity.argmax(1)] == group).mean() > 0.95
    order = RNG.permutation(len(group)); train, test = order[:80], order[80:]
    assert RidgeClassifier().fit(X[train], group[train]).score(X[test], group[test]) > 0.95
    shuffled = RNG.permutation(group)
    assert (shuffled[similarity.argmax(1)] == shuffled).mean() < 0.4   # chance is 0.17


def test_kmer_of_unknown_letters_only_is_an_error():
    with pytest.raises(ValueError, match="only zeros in masked"):
        featurize("kmer", {"masked": "NNNN", "ok": "ACGT"},
                  cache=False,
                  progress=False,
                  modality=Modality.DNA)
    with pytest.raises(ValueError, match="modality: found .*'morgan'"): KmerHash(Modality.CHEMICAL)


def test_default_widths_are_the_composers(): assert [default_width(m) for m in Modality] == [320, 768, 1536]


# ---------------------------------------------------------------- the cache

class Counting(SequenceFeaturizer):
    "Letter counts; writes down what it computed and fails, or dies, where it is told to."
    kind, modality, width, letters_per_batch = "counting", Modality.PROTEIN, 3, 100
    seen, fail_at, die = [], None, False

    def __init__(self, version=1): self.version = version
    def about(self): return dict(version=self.version)
    def config(self): return dict(featurizer="counting", **self.about())
    def embed(self, sequences):
        if self.fail_at is not None and len(self.seen) + len(sequences) > self.fail_at:
            if self.die: os._exit(9)
            raise RuntimeError("planted")
        self.seen.extend(sequences)
        return [[s.count("A"), s.count("C"), len(s)] for s in sequences]


@pytest.fixture
def counting(monkeypatch):
    monkeypatch.setitem(FEATURIZERS, "counting", Counting)
    for name, value in dict(seen=[], fail_at=None, die=False).items():
        monkeypatch.setattr(Counting, name, value)
    return Counting


def test_rows_are_computed_once(counting, tmp_path):
    first = featurize("counting", PROTEINS, cache=tmp_path, progress=False)
    assert sorted(counting.seen) == sorted(set(PROTEINS.values()))
    counting.seen.clear()
    renamed = {f"other name of {k}": f" {v.lower()}\n"
               for k, v in PROTEINS.items()}  # the hash is of the clean sequence
    again = featurize("counting", renamed, cache=tmp_path, progress=False)
    assert counting.seen == []
    np.testing.assert_array_equal(again.values, first.values)
    featurize("counting", PROTEINS | {"new": "AAAA"}, cache=tmp_path, progress=False)
    assert counting.seen == ["AAAA"]
    counting.seen.clear(); featurize("counting", {"new": "AAAA"}, cache=tmp_path, progress=False, version=2)
    assert counting.seen == ["AAAA"]                               # another configuration, another cache
    counting.seen.clear(); featurize("counting", {"new": "AAAA"}, cache=False, progress=False)
    assert counting.seen == ["AAAA"]


def test_cache_lives_in_processed_by_default(counting, tmp_path, monkeypatch):
    monkeypatch.setattr(PATHS, "processed", tmp_path)
    featurize("counting", PROTEINS, progress=False)
    assert [p.suffix for p in (tmp_path/"features").glob("counting-*/*")] == [".safetensors"]


MANY = {f"g{i}": "A"*(i + 1) + "C" for i in range(40)}


def test_an_exception_loses_only_the_batch_that_failed(counting, tmp_path, monkeypatch):
    monkeypatch.setattr(counting, "fail_at", 25)
    with pytest.raises(RuntimeError, match="planted"):
        featurize("counting", MANY, cache=tmp_path, flush_every=10, progress=False)
    done = list(counting.seen)
    assert 15 < len(done) <= 25
    counting.seen.clear(); monkeypatch.setattr(counting, "fail_at", None)
    bank = featurize("counting", MANY, cache=tmp_path, progress=False)
    assert sorted(counting.seen) == sorted(set(MANY.values()) - set(done))
    np.testing.assert_array_equal(bank.values, [[i + 1, 1, i + 2] for i in range(40)])


def test_a_kill_loses_at_most_the_last_chunk(counting, tmp_path):
    child = os.fork()
    if child == 0:
        Counting.fail_at, Counting.die = 25, True
        featurize("counting", MANY, cache=tmp_path, flush_every=5, progress=False)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not list(tmp_path.rglob("*.tmp*"))
    featurize("counting", MANY, cache=tmp_path, flush_every=5, progress=False)
    recomputed = len(counting.seen)
    assert 15 <= recomputed < 40 - 25 + 5 + 10  # 25 were done; at most a chunk and a batch of them are lost


def test_a_broken_chunk_is_named(counting, tmp_path):
    featurize("counting", PROTEINS, cache=tmp_path, progress=False)
    chunk, = tmp_path.rglob("*.safetensors")
    chunk.write_bytes(chunk.read_bytes()[:-3])
    with pytest.raises(ValueError, match=f"{chunk.name}: found a broken cache file .* delete it"):
        featurize("counting", PROTEINS, cache=tmp_path, progress=False)
    chunk.unlink(); featurize("counting", PROTEINS, cache=tmp_path, progress=False)


def test_rows_of_a_wrong_width_are_refused(counting, tmp_path, monkeypatch):
    featurize("counting", {"a": "AC"}, cache=tmp_path, progress=False)
    monkeypatch.setattr(counting, "width", 4)
    with pytest.raises(ValueError, match=r"found rows of shape \(1, 3\), expected \(1, 4\); delete it"):
        featurize("counting", {"a": "AC"}, cache=tmp_path, progress=False)
    with pytest.raises(ValueError, match=r"counting: found rows of shape \(1, 3\), expected \(1, 4\)"):
        featurize("counting", {"a": "AC"}, cache=False, progress=False)


def test_parts_of_a_name_are_averaged(counting):
    bank = featurize("counting", {"pair": ("AC", "AACC"), "list": ["AC"], "one": "AC"},
                     cache=False,
                     progress=False)
    np.testing.assert_array_equal(bank.values, [[1.5, 1.5, 3], [1, 1, 2], [1, 1, 2]])


def test_long_sequences_are_cut_with_a_warning(counting, monkeypatch):
    monkeypatch.setattr(counting, "max_length", 4)
    with pytest.warns(UserWarning, match="1 of 2 sequences were cut to 4 letters: long"):
        bank = featurize("counting", {"long": "AAAAACCC", "short": "AC"}, cache=False, progress=False)
    assert bank.rows("long").tolist() == [[4, 0, 4]] and bank.provenance["cut"] == {"long": 8}


def test_batches_hold_similar_lengths():
    sequences = [spell(AMINO, n) for n in RNG.integers(1, 60, 200)]
    batches = list(cache.length_batches(sequences, 128))
    assert sorted(sum(batches, [])) == sorted(sequences)
    assert all(len(b)*max(map(len, b)) <= 128 for b in batches)
    padded = [{-(-len(s)//16) for s in b} for b in cache.length_batches(sequences, 256, multiple=16)]
    assert max(map(len, padded)) == 1
    assert [len(b) for b in cache.length_batches(["A"*500], 128)] == [1]


def test_registry():
    with pytest.raises(ValueError,
                       match="kind: found 'esm3'; registered are .*kmer.*biojepa.actions.pretrained"):
        featurize("esm3", {"a": "MK"})
    @featurizer("just here")
    def made(inputs, **options): return inputs, options
    try: assert featurize("just here", 1, width=2) == (1, {"width": 2})
    finally: del FEATURIZERS["just here"]


# ---------------------------------------------------------------- molecules

def test_morgan_against_rdkit():
    from rdkit import Chem
    from rdkit.Chem import AllChem, rdFingerprintGenerator
    smiles = {
        "aspirin": "CC(=O)Oc1ccccc1C(=O)O", "imatinib":
        "Cc1ccc(cc1Nc2nccc(n2)c3cccnc3)NC(=O)c4ccc(cc4)CN5CCN(CC5)C", "methane": "C"
    }
    bank = featurize("morgan", smiles, cache=False, progress=False)
    assert bank.width == 768 and bank.modality is Modality.CHEMICAL and set(np.unique(bank.values)) == {0, 1}
    for name, s in smiles.items():
        bits = rdFingerprintGenerator.GetMorganGenerator(radius=2, fpSize=768).GetFingerprint(
            Chem.MolFromSmiles(s)).GetOnBits()
        assert list(np.flatnonzero(bank.rows(name)[0])) == list(bits)
    narrow = featurize("morgan", smiles, cache=False, progress=False, radius=1, width=128)
    assert narrow.width == 128 and narrow.provenance["model"] == "Morgan radius 1"


@pytest.mark.parametrize("smiles,message", [("C1CC", "typo: found the SMILES 'C1CC'"),
                                           ("", "typo: found ''"), ("hello", "RDKit cannot read"),
                                           (None, "typo: found None")])
def test_invalid_smiles_are_named(smiles, message, capfd):
    with pytest.raises(ValueError, match=message): featurize("morgan", {"ok": "C", "typo": smiles}, cache=False)
    assert "SMILES Parse Error" not in capfd.readouterr().err


# ---------------------------------------------------------------- action tokens

def table_of(*rows):
    "A table of (targets, guide_id, guide_seqs, mode)."
    targets, guide_id, guide_seqs, mode = zip(*rows)
    names = tuple("+".join(t) + f"|{g}" if t else "ctrl" for t, g in zip(targets, guide_id))
    conditions = tuple(map(condition_name, targets))
    return ActionTable(names, conditions, targets, guide_id, guide_seqs, mode, (1, )*len(rows))


S1, S2, S3 = spell(BASES, 20), spell(BASES, 20), spell(BASES, 20)
TABLE = table_of((("A", ), "g1", (S1, S2), Mode.CRISPRI), ((), "", (), Mode.CONTROL),
                 (("A", "B"), "g2", (S2, S3), Mode.CRISPRA), (("B", ), "g3", (S3, ), Mode.KNOCKOUT))
PROTEIN = bank_of(RNG.normal(size=(2, 5)))
DNA = bank_of(RNG.normal(size=(3, 8)), (S1, S2, S3), Modality.DNA)


def test_action_batch_by_hand():
    batch = action_batch(TABLE, [PROTEIN, DNA])
    assert batch.features.shape == (
        4, 4,
        8) and batch.features.dtype == torch.float32 and batch.present.sum(1).tolist() == [2, 0, 4, 2]
    def token(i, j, width): return batch.features[i, j, :width].numpy()
    np.testing.assert_array_equal(token(0, 0, 5), PROTEIN.rows("A")[0])
    np.testing.assert_allclose(token(0, 1, 8), (DNA.rows(S1)[0] + DNA.rows(S2)[0])/2,
                               rtol=1e-6)  # two guides of one target: their mean
    for j, (bank, key) in enumerate([(PROTEIN, "A"), (PROTEIN, "B"), (DNA, S2), (DNA, S3)]):
        np.testing.assert_array_equal(token(2, j, bank.width), bank.rows(key)[0])
    assert batch.modality[2].tolist() == [Modality.PROTEIN]*2 + [Modality.DNA]*2 and batch.mode[2].tolist(
    ) == [Mode.CRISPRA]*4
    assert batch.mode[0, :2].tolist() == [Mode.CRISPRI
                                          ]*2 and batch.modality.dtype == batch.mode.dtype == torch.int64
    assert not batch.features[~batch.present].any() and not batch.features[0, 0,
                                                                           5:].any()  # padding is zero


def test_one_bank_and_one_mode():
    batch = action_batch(TABLE, PROTEIN, mode=Mode.CONTROL)
    assert batch.features.shape == (4, 2, 5) and set(batch.mode[batch.present].tolist()) == {Mode.CONTROL}
    controls = action_batch(table_of(((), "", (), Mode.CONTROL)), PROTEIN)
    assert controls.features.shape == (1, 1, 5) and not controls.present.any()


def test_a_guide_id_may_be_the_key():
    by_id = bank_of([[1, 2], [3, 4], [5, 6]], ("g1", "g2", "g3"), Modality.DNA)
    batch = action_batch(TABLE, by_id)
    assert batch.present.sum(1).tolist() == [1, 0, 1, 1] and batch.features[2, 0].tolist() == [3, 4]


def test_a_missing_target_is_an_error_that_names_it():
    only_a = PROTEIN.select(["A"])
    with pytest.raises(
            MissingFeatureError,
            match=r"2 of 4 perturbations have no feature.*A\+B\|g2: B \(PROTEIN\), B\|g3: B \(PROTEIN\)"):
        action_batch(TABLE, [only_a, DNA])
    no_guide = table_of((("A",), "", (), Mode.CRISPRI))
    with pytest.raises(MissingFeatureError, match=r"guide sequence \(DNA\)"): action_batch(no_guide, DNA)


def test_dropped_rows_are_listed_and_the_kept_ones_returned():
    with pytest.warns(UserWarning, match=r"2 of 4 perturbations have no feature.*A\+B\|g2.*B\|g3.*dropped"):
        batch, kept = action_batch(TABLE, [PROTEIN.select(["A"]), DNA], missing="drop")
    assert kept.tolist() == [
        0, 1
    ] and batch.features.shape == (2, 2, 8) and batch.present.sum(1).tolist() == [2, 0]
    batch, kept = action_batch(TABLE, [PROTEIN, DNA],
                               missing="drop")  # nothing missing: no warning, everything kept
    assert kept.tolist() == [0, 1, 2, 3]


def test_action_batch_refuses_banks_that_do_not_go_together():
    for banks, message in (([], "found none"), ([PROTEIN, bank_of([[1], [2]])], "one width per modality")):
        with pytest.raises(ValueError, match=message): action_batch(TABLE, banks)
    with pytest.raises(ValueError, match="missing: found 'ignore'"):
        action_batch(TABLE, PROTEIN, missing="ignore")


# ---------------------------------------------------------------- real and simulated screens

def test_the_whole_way_on_the_simulator():
    from biojepa.data.network import SimulationSpec
    from biojepa.data.simulate import simulate_perturb_seq
    adata = simulate_perturb_seq(
        SimulationSpec(n_genes=100, n_cells=200, n_targets=10, n_modules=4, n_doubles=3))
    table = ActionTable.from_anndata(adata)
    protein = featurize("kmer",
                        adata.uns["protein_sequences"],
                        cache=False,
                        progress=False,
                        modality=Modality.PROTEIN)
    dna = featurize("kmer", {g: g for seqs in table.guide_seqs for g in seqs},
                    cache=False,
                    progress=False,
                    modality=Modality.DNA)
    batch = action_batch(table, [protein, dna])
    assert len(batch.features) == len(
        adata.obs["perturbation"].cat.categories)  # row p is perturbation code p
    code = adata.obs["perturbation"].cat.codes.to_numpy().astype(int)
    for cell in np.random.default_rng(0).choice(
            adata.n_obs, 30, replace=False):  # from the cell's own annotation to its tokens
        obs, row = adata.obs.iloc[cell], batch.take(torch.tensor([code[cell]]))
        targets = [] if obs.condition == "ctrl" else sorted(set(obs.condition.split("+")) - {"ctrl"})
        guides = dna.rows([obs.guide_seq_a, obs.guide_seq_b]) if targets else np.zeros((0, 1536))
        expected = [*protein.rows(targets), *([guides.mean(0)] if len(targets) == 1 else guides)]
        assert row.present.sum() == len(expected) and set(
            row.mode[row.present].tolist()) <= {Mode[obs["mode"].upper()]}
        for j, f in enumerate(expected):
            np.testing.assert_allclose(row.features[0, j, :len(f)], f, atol=1e-6)


def test_real_proteins_of_the_twins_targets(shared):
    "271 of the twin's 652 targets (simulated cells, real gene names) have a real protein sequence; all have guides."
    from biojepa.data.datasets import load_dataset
    adata = load_dataset(shared/"k562_essential_twin.h5ad",
                         condition="condition",
                         control="ctrl",
                         batch="gem_group",
                         cell_type="cell_type",
                         guide="guide_id",
                         guide_seq=("guide_seq_a", "guide_seq_b"))
    table = ActionTable.from_anndata(adata, mode=Mode.CRISPRI)
    sequences = pd.read_csv(shared/"protein_sequences_partial.csv.gz").set_index("gene")["seq"]
    protein = featurize("kmer",
                        sequences[sequences.index.isin(table.genes)],
                        cache=False,
                        progress=False,
                        modality=Modality.PROTEIN)
    assert (len(table.genes), len(protein)) == (652, 271)
    with pytest.raises(MissingFeatureError, match="perturbations have no feature.*AATF|.*PROTEIN"):
        action_batch(table, protein)
    with pytest.warns(UserWarning, match="dropped"): batch, kept = action_batch(table, protein, missing="drop")
    assert {g for t in table.select(kept).targets
            for g in t} == set(protein.keys) and batch.present.sum() == (~table.is_control[kept]).sum()
    dna = featurize("kmer", {g: g for seqs in table.guide_seqs for g in seqs},
                    cache=False,
                    progress=False,
                    modality=Modality.DNA)
    assert action_batch(table, dna).present.sum() == (~table.is_control).sum()
