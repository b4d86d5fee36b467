import figure

from bnnlib.runs.ledger import stored_runs


def test_the_readme_shows_every_stored_memorizer():
    names = ("svhn-noise-100", "cifar10-noise-100")
    for ax, name in zip(figure.draw().axes, names, strict=True):
        curves = [line for line in ax.lines if line.get_gid() != "chance"]
        assert len(curves) == 2 * len(stored_runs(name))  # train and test
        assert [text.get_text() for text in ax.get_legend().get_texts()] == ["train", "test"]
    assert figure.PATH.is_file()
