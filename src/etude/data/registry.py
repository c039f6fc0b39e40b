"""The datasets etude knows: official files, sizes, pinned checksums, licence, citation.

A frozen table and nothing else: importing it costs no numpy and no torch. Every SHA-256 is one that somebody
else published, and the `published` field says who (of Multi30k the git object ids are what was published). For MNIST and
tiny Shakespeare it was recomputed from the official files and agreed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

TFDS = "TensorFlow Datasets, tensorflow_datasets/url_checksums"
"""Where the SHA-256 values and sizes below were published (one file a dataset)."""

MULTI30K = "github.com/multi30k/dataset, by its git object ids; SHA-256 computed from files whose object ids agree"


@dataclass(frozen=True)
class File:
    """One official file: its path inside the dataset's folder, home, size in bytes and SHA-256."""

    path: str
    url: str
    bytes: int
    sha256: str
    published: str = TFDS


@dataclass(frozen=True)
class Dataset:
    """One row of the table. `train` and `test` count images (or characters of text, alphabets' characters, sentences)."""

    name: str
    title: str
    kind: Literal["images", "text", "characters", "parallel"]
    train: int
    test: int
    shape: tuple[int, ...]
    classes: tuple[str, ...]
    home: str
    licence: str
    citation: str
    files: tuple[File, ...] = ()
    folder: str = ""
    """Folder below ETUDE_DATA when it is not the dataset's name."""
    note: str = ""

    @property
    def bundled(self) -> bool:
        """True when the data come with an installed package and need no download."""
        return not self.files and not self.folder


DIGITS = tuple("0123456789")
FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
KUZUSHIJI = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")
CIFAR = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def _four_idx(base: str, rows: tuple[tuple[int, str], ...]) -> tuple[File, ...]:
    names = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    return tuple(
        File(f"{name}-ubyte.gz", f"{base}{name}-ubyte.gz", size, digest) for name, (size, digest) in zip(names, rows)
    )


def _multi30k(*rows: tuple[str, int, str]) -> tuple[File, ...]:
    base = "https://github.com/multi30k/dataset/raw/master/data/task1/raw/"
    return tuple(File(name, base + name, size, digest, MULTI30K) for name, size, digest in rows)


DATASETS: tuple[Dataset, ...] = (
    Dataset(
        name="digits",
        title="Handwritten digits, 8×8 grey, 1,797 real scans bundled with scikit-learn",
        kind="images",
        train=1437,
        test=360,
        shape=(1, 8, 8),
        classes=DIGITS,
        home="https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits",
        licence="CC BY 4.0 (UCI); bundled in scikit-learn (BSD-3-Clause)",
        citation="Alpaydin and Kaynak, Cascading Classifiers, Kybernetika 34(4), 1998",
        note="A fixed stratified split of the UCI test set; the 13 writers occur on both sides.",
    ),
    Dataset(
        name="mnist",
        title="Handwritten digits, 28×28 grey",
        kind="images",
        train=60000,
        test=10000,
        shape=(1, 28, 28),
        classes=DIGITS,
        home="http://yann.lecun.com/exdb/mnist/",
        licence="CC BY-SA 3.0 as commonly stated",
        citation="LeCun, Bottou, Bengio and Haffner, Gradient-Based Learning Applied to Document Recognition, 1998",
        files=_four_idx(
            "https://ossci-datasets.s3.amazonaws.com/mnist/",
            (
                (9912422, "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"),
                (28881, "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"),
                (1648877, "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"),
                (4542, "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"),
            ),
        ),
        note="The official home no longer serves the files; this HTTPS mirror holds the same bytes.",
    ),
    Dataset(
        name="fashion_mnist",
        title="Articles of clothing, 28×28 grey",
        kind="images",
        train=60000,
        test=10000,
        shape=(1, 28, 28),
        classes=FASHION,
        home="https://github.com/zalandoresearch/fashion-mnist",
        licence="MIT",
        citation="Xiao, Rasul and Vollgraf, Fashion-MNIST, 2017, arXiv:1708.07747",
        files=_four_idx(
            "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
            (
                (26421880, "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84"),
                (29515, "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845"),
                (4422102, "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073"),
                (5148, "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"),
            ),
        ),
    ),
    Dataset(
        name="kmnist",
        title="Cursive Japanese characters (Kuzushiji-MNIST), 28×28 grey",
        kind="images",
        train=60000,
        test=10000,
        shape=(1, 28, 28),
        classes=KUZUSHIJI,
        home="https://codh.rois.ac.jp/kmnist/",
        licence="CC BY-SA 4.0",
        citation="Clanuwat et al., Deep Learning for Classical Japanese Literature, 2018, arXiv:1812.01718",
        files=_four_idx(
            "https://codh.rois.ac.jp/kmnist/dataset/kmnist/",
            (
                (18165135, "51467d22d8cc72929e2a028a0428f2086b092bb31cfb79c69cc0a90ce135fde4"),
                (29497, "e38f9ebcd0f3ebcdec7fc8eabdcdaef93bb0df8ea12bee65224341c8183d8e17"),
                (3041136, "edd7a857845ad6bb1d0ba43fe7e794d164fe2dce499a1694695a792adfac43c5"),
                (5120, "20bb9a0ef54c7db3efc55a92eef5582c109615df22683c380526788f98e42a1c"),
            ),
        ),
    ),
    Dataset(
        name="cifar10",
        title="Photographs of ten kinds of objects, 32×32 colour",
        kind="images",
        train=50000,
        test=10000,
        shape=(3, 32, 32),
        classes=CIFAR,
        home="https://www.cs.toronto.edu/~kriz/cifar.html",
        licence="none stated; research use with citation",
        citation="Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009",
        files=(
            File(
                "cifar-10-binary.tar.gz",
                "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
                170052171,
                "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
            ),
        ),
        note="The archive is read as it is; an unpacked cifar-10-batches-bin folder is read too.",
    ),
    Dataset(
        name="cifar10_partial",
        title="Whatever unpacked CIFAR-10 batches are there, whole or cut short, with a split of our own",
        kind="images",
        train=0,
        test=0,
        shape=(3, 32, 32),
        classes=CIFAR,
        home="https://www.cs.toronto.edu/~kriz/cifar.html",
        licence="none stated; research use with citation",
        citation="Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009",
        folder="cifar10",
        note="Original pixels, but not the official split: its scores are not comparable with published ones.",
    ),
    Dataset(
        name="cifar10_jpeg",
        title="CIFAR-10 as JPEG files (quality 75): lossy, so scores are lower than published ones",
        kind="images",
        train=50000,
        test=10000,
        shape=(3, 32, 32),
        classes=CIFAR,
        home="https://www.cs.toronto.edu/~kriz/cifar.html",
        licence="none stated; research use with citation",
        citation="Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009",
        folder="cifar10",
        note="Reads cifar-10-images-jpeg-q75.tar.gz (train/<class>/NNNN.jpg, test/<class>/NNNN.jpg); not downloadable.",
    ),
    Dataset(
        name="omniglot",
        title="Handwritten characters of 50 alphabets, 20 drawings each, 105×105 black and white",
        kind="characters",
        train=964,
        test=659,
        shape=(1, 105, 105),
        classes=(),
        home="https://github.com/brendenlake/omniglot",
        licence="MIT",
        citation="Lake, Salakhutdinov and Tenenbaum, Human-level concept learning, Science 350(6266), 2015",
        files=(
            File(
                "images_background.zip",
                "https://github.com/brendenlake/omniglot/raw/master/python/images_background.zip",
                9464212,
                "ad41ab679c8b5d90b271ef46be6987cc81211774a695c29dcc5367b2b26ee640",
            ),
            File(
                "images_evaluation.zip",
                "https://github.com/brendenlake/omniglot/raw/master/python/images_evaluation.zip",
                6462886,
                "1f61a8f3366785b057fc117d9228e78a16e3d976c8953b2a10fcc74cf0609cee",
            ),
        ),
    ),
    Dataset(
        name="tiny_shakespeare",
        title="Plays of Shakespeare in one file of 1,115,394 characters",
        kind="text",
        train=1115394,
        test=0,
        shape=(),
        classes=(),
        home="https://github.com/karpathy/char-rnn",
        licence="text in the public domain",
        citation="Karpathy, The Unreasonable Effectiveness of Recurrent Neural Networks, 2015",
        files=(
            File(
                "input.txt",
                "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
                1115394,
                "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
            ),
        ),
    ),
    Dataset(
        name="multi30k",
        title="Captions of 31,014 photographs in English, German and French, line by line",
        kind="parallel",
        train=29000,
        test=1000,
        shape=(),
        classes=(),
        home="https://github.com/multi30k/dataset",
        licence="non-commercial research and education (derived from Flickr30K)",
        citation="Elliott, Frank, Sima'an and Specia, Multi30K: Multilingual English-German Image Descriptions, 2016",
        files=_multi30k(
            ("train.en.gz", 568929, "d79cfa999dd4c51d2cb42499b6796d5a882c3a8a961923c25a898c90f8bbd56f"),
            ("train.de.gz", 637044, "726e39b2fa9eb9ffb6dc763fb35a179f80fae06ffc5d28b6ace5faa883de28a6"),
            ("train.fr.gz", 604242, "622e75069e9f4c577425c4f277116ce66e63a2401c0a2312d90073cb12379a3c"),
            ("val.en.gz", 21650, "14f7d25ddd868909a9213e361768460edcacdd6ab9d1e77b92560dc10c10dc28"),
            ("val.de.gz", 24681, "f0cba2f995189cf5770f29a8a9a537a3ad3f51657ad873405082ff6863a5e75a"),
            ("val.fr.gz", 23001, "ca3106f1a72390591d25f6c45cb4cd39dec4cd3f123e099748a3ce5256c160e9"),
            ("test_2016_flickr.en.gz", 21077, "611d361c6334bc7246101d48097c13cf5c4413c5befc793cc629934359d532d9"),
            ("test_2016_flickr.de.gz", 22890, "9204244e408ccb38d2a55cfcd344df15005fc42a07a6e55ca6c52b6ababb8cc8"),
            ("test_2016_flickr.fr.gz", 22310, "6d326e188d259fb1d04ac19eae3af956559b3a0b93d7635e56c90987c40c8b90"),
        ),
        note="Task 1, raw text; 1,014 more sentences validate, and the test is that of 2016 (Flickr).",
    ),
    Dataset(
        name="house_text",
        title="The opening of Shakespeare's Coriolanus, 29,951 characters bundled with etude",
        kind="text",
        train=29951,
        test=0,
        shape=(),
        classes=(),
        home="https://github.com/karpathy/char-rnn",
        licence="text in the public domain",
        citation="Shakespeare, The Tragedy of Coriolanus, Act 1",
        note="The first 29,951 characters of tiny_shakespeare, so that text methods run offline on something real.",
    ),
)

BY_NAME: dict[str, Dataset] = {dataset.name: dataset for dataset in DATASETS}
