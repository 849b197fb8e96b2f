"""Folders: splits, classes, hidden files, links and metadata as `datasets` and common sense have them."""

import json

import datasets
import numpy as np
import pytest
from painted import picture
from pictures import choose_split, open_pictures, open_stream, split_names
from pictures.sources import say_once


def paint(folder, *names):
    """Save picture i under name i."""
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(folder / name, "JPEG" if name.lower().endswith(("jpg", "jfif")) else None)
    return str(folder)


def held(name, split="train", **settings):
    """The numbers of the pictures in a split."""
    found = open_pictures(name, split, **settings)
    return [int(np.median(np.asarray(found.picture(i).convert("RGB"))[..., 0])) for i in range(found.count)]


@pytest.mark.parametrize(
    ("names", "splits", "classes"),
    [
        (
            ["train/cat/0.png", "train/dog/0.png", "test/cat/1.png", "test/dog/1.png"],
            {"train": [0, 1], "test": [2, 3]},
            ("cat", "dog"),
        ),
        (
            ["training/a/0.png", "training/b/0.png", "valid/a/0.png", "eval/b/0.png"],
            {"train": [0, 1], "validation": [2], "test": [3]},
            ("a", "b"),
        ),
        (["Train/a/0.png", "Train/b/0.png", "TEST/a/0.png"], {"train": [0, 1], "test": [2]}, ("a", "b")),
        (["a/train/0.png", "b/train/0.png", "b/test/0.png"], {"train": [0, 1], "test": [2]}, ("a", "b")),
        (["x/my-train_2/a/0.png", "x/my-train_2/b/0.png", "x/val2017/a/0.png"], {"train": [0, 1]}, ("a", "b")),
        (["train/a/images/0.png", "train/b/images/0.png"], {"train": [0, 1]}, ("a", "b")),
        (["images/a/0.png", "images/b/0.png"], {"train": [0, 1]}, ("a", "b")),
        (["bus/0.png", "car/0.png", "train/0.png"], {"train": [0, 1, 2]}, ("bus", "car", "train")),
        (["train/a/0.png", "train/b/0.png", "train/test/0.png"], {"train": [0, 1, 2]}, ("a", "b", "test")),
    ],
)
def test_splits_and_classes(tmp_path, names, splits, classes):
    name = paint(tmp_path, *names)
    assert {split: held(name, split) for split in split_names(name) if split in splits} == splits
    found = open_pictures(name, labelled=True)
    assert (found.classes, found.split) == (classes, "train")
    assert sorted(set(found.labels.tolist())) == list(range(len(classes)))


def test_the_loader_of_datasets_finds_the_same(tmp_path):
    """In folders that it reads without losses."""
    names = [f"{split}/{kind}/{i}.png" for split in ("train", "val", "test") for kind in "ab" for i in range(2)]
    name = paint(tmp_path, *names, "test/b/9.gif", "notes.txt/7.png")
    theirs = datasets.load_dataset("imagefolder", data_dir=name)
    assert set(split_names(name)) == set(theirs)
    for split, rows in theirs.items():
        found = open_pictures(name, split, labelled=True)
        assert found.classes == tuple(rows.features["label"].names)
        paths = rows.cast_column("image", datasets.Image(decode=False))["image"]
        listed = {path["path"]: label for path, label in zip(paths, rows["label"], strict=True)}
        ours = [found.where(i).split("(")[-1].rstrip(")") for i in range(found.count)]
        assert {path: found.labels[i] for i, path in enumerate(ours)} == listed


def test_a_split_is_chosen_by_its_name_or_refused(tmp_path):
    name = paint(tmp_path / "a", "train/0.png", "validation/0.png")
    assert choose_split(name, None) == "validation"
    assert choose_split(name, "val") == choose_split(name, "dev") == "validation"
    assert choose_split("digits", None) == "test"
    undivided = paint(tmp_path / "b", "0.png")
    assert choose_split(undivided, None) == "train"
    for wrong in ("nonsense", "test", "validation"):
        with pytest.raises(ValueError, match=f"has no split '{wrong}': it has train"):
            choose_split(undivided, wrong)
    with pytest.raises(ValueError, match="has no split 'train': it has test"):
        open_pictures(paint(tmp_path / "c", "test/0.png"))


def test_hidden_and_foreign_files_are_counted_and_named_once(tmp_path, capsys):
    names = ["cat/0.png", "dog/0.PNG", "cat/1.gif", "dog/1.jfif"]
    hidden = [".ipynb_checkpoints/0.png", "__MACOSX/cat/0.png", "cat/._0.png", "dog/.hidden/0.png", "@eaDir/0.png"]
    name = paint(tmp_path, *names, *hidden)
    (tmp_path / "cat" / "noname").write_text("x")
    (tmp_path / "dog" / "clip.mov").write_text("x")
    (tmp_path / "dog" / "gone.png").symlink_to("nowhere.png")
    say_once.cache_clear()
    found = open_pictures(name, labelled=True)
    assert (found.count, found.classes, found.labels.tolist()) == (4, ("cat", "dog"), [0, 0, 1, 1])
    note = capsys.readouterr().err
    assert "6 hidden or linked to nothing (" in note
    assert "2 of other kinds (cat/noname, dog/clip.mov)" in note
    open_pictures(name)
    assert capsys.readouterr().err == ""


def test_pictures_outside_the_splits_are_counted(tmp_path, capsys):
    name = paint(tmp_path, "train/a/0.png", "test/a/0.png", "cover.png", "more/a/0.png")
    assert held(name) == [0]
    assert "2 outside the splits test, train (cover.png, more/a/0.png)" in capsys.readouterr().err


def test_links_are_followed_and_loops_end(tmp_path):
    away = tmp_path / "away"
    paint(away, "cats/a.png", "single.png")
    name = paint(tmp_path / "set", "dog/0.png")
    (tmp_path / "set" / "cat").symlink_to(away / "cats")
    (tmp_path / "set" / "dog" / "z.png").symlink_to(away / "single.png")
    (tmp_path / "set" / "dog" / "around").symlink_to(tmp_path / "set")
    found = open_pictures(name, labelled=True)
    assert (found.classes, found.labels.tolist()) == (("cat", "dog"), [0, 1, 1])
    (tmp_path / "linked").symlink_to(tmp_path / "set")
    assert held(str(tmp_path / "linked")) == held(name) == [0, 0, 1]


def test_mixed_folders_are_refused(tmp_path):
    rows = datasets.Dataset.from_dict({"image": [picture(i) for i in range(3)]}).cast_column("image", datasets.Image())
    for name in ("a/train.parquet", "b/deep/er.parquet", "c/rows.parquet"):
        (tmp_path / name).parent.mkdir(parents=True)
        rows.to_parquet(tmp_path / name)
    for folder, extra in (("a", "cover.png"), ("b", "preview/0.JPG")):
        name = paint(tmp_path / folder, extra)
        for opened in (open_pictures, open_stream, split_names):
            with pytest.raises(ValueError, match=f"mixes pictures and rows, such as {extra} and "):
                opened(name)
    rows.save_to_disk(tmp_path / "saved")
    next((tmp_path / "saved").glob("*.arrow")).rename(tmp_path / "c" / "a.arrow")
    with pytest.raises(ValueError, match="mixes .arrow and .parquet files"):
        open_pictures(str(tmp_path / "c"))


def test_rows_outside_the_splits_and_shards(parquet, capsys):
    for name in ("test-0.parquet", "extra-00000-of-00001.parquet", "notes.parquet"):
        (parquet / name).write_bytes((parquet / "train-0.parquet").read_bytes())
    assert split_names(str(parquet)) == ("train", "test", "extra")
    assert [open_pictures(str(parquet), split).count for split in ("train", "extra")] == [40, 20]
    assert "1 outside the splits extra, test, train (notes.parquet)" in capsys.readouterr().err


# ---- metadata ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("place", ["beside the splits", "in the splits"])
def test_metadata_has_the_labels(tmp_path, kind, place):
    """Never the folders; and the pictures are those that it lists, also without a suffix."""
    name = paint(tmp_path, "train/x/0.png", "train/y/1.png", "train/y/2.png", "test/x/0.png", "train/y/unlisted.png")
    (tmp_path / "train/y/2.png").rename(tmp_path / "train/y/2")
    rows = [("train/x/0.png", "owl"), ("train/y/1.png", "fox"), ("train/y/2", "owl"), ("test/x/0.png", "fox")]
    tables = {tmp_path: rows}
    if place == "in the splits":
        tables = {
            tmp_path / split: [
                (file.removeprefix(f"{split}/"), label) for file, label in rows if file.startswith(split)
            ]
            for split in ("train", "test")
        }
    for folder, table in tables.items():
        made = {"file_name": [file for file, _ in table], "label": [label for _, label in table]}
        made = datasets.Dataset.from_dict(made | {"size": [8] * len(table)})
        {"jsonl": made.to_json, "csv": made.to_csv, "parquet": made.to_parquet}[kind](folder / f"metadata.{kind}")
    assert split_names(name) == ("train", "test")
    found = open_pictures(name, labelled=True)
    assert (found.classes, found.labels.tolist()) == (("fox", "owl"), [1, 0, 1])
    assert held(name) == [0, 1, 2]
    assert open_pictures(name, labelled=True, label_column="size").classes == ("8",)
    with pytest.raises(ValueError, match="has no column 'kind': its columns are image, label, size"):
        open_pictures(name, labelled=True, label_column="kind")


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (['{"file_name": "b.png", "label": 1}'], "lists b.png, which .* does not hold"),
        (['{"file_name": "../a.png", "label": 1}'], r"lists \.\./a.png, which .* does not hold"),
        (['{"name": "a.png"}'], "must name a picture as file_name in each row"),
        (['{"file_name": "a.png", "label"'], "cannot read .*metadata.jsonl: row 1 is no JSON"),
        (["", '["a.png", 1]'], r'cannot read .*metadata.jsonl: row 2 is \["a.png", 1\], no object such as'),
        (["3"], "row 1 is 3, no object such as"),
        (['{"file_name": "a.png"}', "null"], "row 2 is null, no object such as"),
        (['{"file_name": "a.png", "label": null}'], "the column 'label' of .* holds no labels"),
        (['{"file_name": "a.png", "text": "x"}'], "has no column of labels.* its columns are image, text; name one"),
    ],
)
def test_metadata_that_is_wrong(tmp_path, lines, said):
    name = paint(tmp_path, "a.png")
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=said):
        open_pictures(name, labelled=True)


CSV = [
    (("01", "1", "00"), ("00", "01", "1")),
    (("007", "7", "007"), ("007", "7")),
    (("10", "9", " 2"), ("2", "9", "10")),  # in the order of the numbers
    (("10", "9", "x"), ("10", "9", "x")),
    (("1e5", "100000", "2"), ("100000", "1e5", "2")),
    (("True", "False", "True"), ("False", "True")),
    (("1" + "0" * 24, "2", "3"), ("1" + "0" * 24, "2", "3")),
]


@pytest.mark.parametrize(("labels", "classes"), CSV)
def test_labels_of_a_table_are_kept_as_they_are(tmp_path, labels, classes):
    rows = [f"{i}.png,{label}" for i, label in enumerate(labels)]
    for apart in (False, True):  # in one file, or in one for each picture
        folder = tmp_path / str(apart)
        name = paint(folder, *(f"{i}/{i}.png" if apart else f"{i}.png" for i in range(3)))
        for place, lines in [(str(i), rows[i : i + 1]) for i in range(3)] if apart else [("", rows)]:
            (folder / place / "metadata.csv").write_text("\n".join(["file_name,label", *lines]))
        found = open_pictures(name, labelled=True)
        assert found.classes == classes
        assert [classes[i] for i in found.labels] == [label.strip() for label in labels]


def test_fractions_are_no_labels(tmp_path):
    name = paint(tmp_path, "a.png", "b.png")
    for one, other in (("1.0", "2"), ("0.25", "1e-05"), ("-.5", "1")):
        (tmp_path / "metadata.csv").write_text(f"file_name,label\na.png,{one}\nb.png,{other}\n")
        with pytest.raises(ValueError, match="the column 'label' of .* holds no labels"):
            open_pictures(name, labelled=True)


def test_labels_of_objects(tmp_path):
    """Truth, integers of any length, and text with other ends of lines than one by one."""
    name = paint(tmp_path, "a.png", "b.png")
    for one, other, classes in (
        ("true", "false", ("False", "True")),
        ("1" + "0" * 24, "2", ("1" + "0" * 24, "2")),
        (str(2**63), "-1", ("-1", str(2**63))),
        ('"x\u2028y"', '"\x85"', ("x\u2028y", "\x85")),
        ('"01"', '"1"', ("01", "1")),
    ):
        lines = (f'{{"file_name": "a.png", "label": {one}}}', f'{{"file_name": "b.png", "label": {other}}}\r')
        (tmp_path / "metadata.jsonl").write_bytes("\n".join((*lines, "", "")).encode())
        found = open_pictures(name, labelled=True)
        assert set(found.classes) == set(classes)
        assert len(set(found.labels.tolist())) == 2


def test_a_path_that_is_no_text(tmp_path):
    paint(tmp_path / "set", "a/0.png")
    (tmp_path / "set" / "a" / "0.png").rename(tmp_path / "set" / "a" / "\udcff.png")
    with pytest.raises(ValueError, match=r"the path '.*/set/a/\\udcff.png' is not UTF-8: rename it"):
        open_pictures(str(tmp_path / "set"))
    (tmp_path / "set" / "metadata.jsonl").write_text('{"file_name": "a/\\udcff.png", "label": 1}')
    with pytest.raises(ValueError, match="is not UTF-8: rename it"):
        open_pictures(str(tmp_path / "set"), labelled=True)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("https://huggingface.co/datasets/user/data", "pass its id, user/data, or a folder"),
        ("hf://datasets/user/data/a.parquet", "pass its id, user/data, or a folder"),
        ("https://example.com/data.parquet", "pass an id such as user/data, or a folder"),
        ("https://example.com/data?part=*", "pass an id such as user/data, or a folder"),
        ("s3://bucket/data", "pass an id such as user/data, or a folder"),
    ],
)
def test_an_address_is_no_data_set(name, said):
    for opened in (open_pictures, open_stream):
        for split in ("train", None):
            with pytest.raises(ValueError, match=f"is an address: {said}"):
                opened(name, split)


def test_labels_of_two_types_do_not_matter_without_labels(tmp_path):
    name = paint(tmp_path, "a.png", "b.png")
    lines = ('{"file_name": "a.png", "label": 1}', '{"file_name": "b.png", "label": "x"}')
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    assert open_pictures(name).count == 2
    with pytest.raises(ValueError, match="cannot read the metadata files of"):
        open_pictures(name, labelled=True)


def test_two_metadata_files_are_refused_and_none_is_a_name(tmp_path):
    name = paint(tmp_path, "a.png", "b.png")
    (tmp_path / "metadata.csv").write_text("file_name,label\na.png,None\nb.png,NA\n")
    assert open_pictures(name, labelled=True).classes == ("NA", "None")
    (tmp_path / "metadata.jsonl").write_text("")
    with pytest.raises(ValueError, match="has several metadata files"):
        open_pictures(name)


def test_a_label_column_is_never_ignored(tmp_path):
    name = paint(tmp_path, "cat/0.png", "dog/0.png")
    assert open_pictures(name, labelled=True, label_column="label").classes == ("cat", "dog")
    for each in (name, "digits"):
        with pytest.raises(ValueError, match="has no column 'kind'.*: its columns are image, label"):
            open_pictures(each, labelled=True, label_column="kind")
    with pytest.raises(ValueError, match="digits has no column 'img'"):
        open_pictures("digits", image_column="img")


def test_configurations(tmp_path):
    """Those that a README declares, as on the Hub; a folder without any refuses the name of one."""
    for kind in ("small", "large"):
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
        rows = {"image": [picture(len(kind))], "label": [kind == "large"]}
        (tmp_path / "set" / kind).mkdir(parents=True)
        datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "set" / kind / "rows.parquet")
    declared = "".join(
        f"- config_name: {kind}\n  data_files:\n  - split: test\n    path: {kind}/*\n" for kind in ("small", "large")
    )
    (tmp_path / "set" / "README.md").write_text(f"---\nconfigs:\n{declared}---\n# A set\n")
    name = str(tmp_path / "set")
    assert split_names(name, "small") == ("test",)
    assert open_pictures(name, "test", data_config="large", labelled=True).labels.tolist() == [1]
    with pytest.raises(ValueError, match="--data_config"):
        open_pictures(name, "test")
    plain = paint(tmp_path / "plain", "0.png")
    for each in (plain, "digits"):
        with pytest.raises(ValueError, match="has no configurations: leave out data_config='small'"):
            open_pictures(each, "train", data_config="small")


def test_scripts_have_the_settings_of_reading():
    import classifier
    import evaluate
    import few_steps
    import nll
    import reconstruct
    import sample
    import train
    from pictures import Reading

    configs = (classifier.ClassifierConfig, evaluate.EvaluateConfig, few_steps.FewStepsConfig, nll.NLLConfig)
    for config in (*configs, reconstruct.ReconstructConfig, sample.SampleConfig, train.TrainConfig):
        assert issubclass(config, Reading)
    assert json.dumps(Reading(bit_depth=12).reading) == (
        '{"data_config": null, "image_column": null, "background": null, "bit_depth": 12}'
    )
