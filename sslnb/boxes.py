"""Images with the objects in them, for detection: boxes, classes and masks, read from the layouts of VOC and COCO.

    VOCdevkit/VOC{2007,2012}/    Annotations/*.xml  ImageSets/Main/{trainval,test}.txt  JPEGImages/*.jpg
    COCO                         annotations/instances_{train,val}2017.json  train2017/*.jpg  val2017/*.jpg

`sslnb.data.load` knows both by their folders: "train" is the trainval of every year of VOC that is there, "test" that
of 2007. A box is x1, y1, x2, y2 in pixels from the corner of the image, and a pixel is 1 wide: x2 - x1 is its width.
"""

import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from .data import Images
from .errors import InputError, unknown
from .files import expanded
from .segments import decoded

VOC_CLASSES = ["aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
               "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"]
SLIVER = 0.01  # px: a box must be wider, else it is nothing in single precision


@dataclass
class Objects:
    """M objects, of one image or of many."""

    boxes: np.ndarray  # (M, 4) float64
    classes: np.ndarray  # (M,) int64, from 0
    special: np.ndarray  # (M,) bool: VOC's "difficult" or COCO's "crowd"
    areas: np.ndarray  # (M,) float64 in px: of the mask if there is one
    masks: np.ndarray | None = None  # (M,) COCO's "segmentation" as JSON text, a tenth of what lists would need

    def __len__(self) -> int:
        return len(self.boxes)

    def at(self, where) -> "Objects":
        """Those at these positions, or of this slice."""
        return Objects(*(None if a is None else a[where] for a in vars(self).values()))


class Boxes(Images):
    """`images[i]` is a PIL image in RGB, `images.objects(i)` what is in it, `images.sizes[i]` its width and height.

    `classes` names the classes from 0, `category_ids` has COCO's numbers of them, `ids` (N,) those of the images.
    `rule` is how such data are measured: "voc 11 points", "voc area" or "coco". There are no labels of whole images.
    """

    def __init__(self, name: str, split: str, items, *, sizes: np.ndarray, counts: Sequence[int], objects: Objects,
                 classes: Sequence[str], rule: str, ids: Sequence[int], category_ids: Sequence[int],
                 root: Path | None = None) -> None:
        super().__init__(name, split, items, root=root)
        self.sizes, self.ids, self.rule = np.asarray(sizes).reshape(-1, 2), np.asarray(ids), rule
        self.starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self.everything, self.classes, self.category_ids = objects, list(classes), list(category_ids)
        self._check()

    def _check(self) -> None:
        owner, boxes = np.repeat(np.arange(len(self)), np.diff(self.starts)), self.everything.boxes
        outside = np.flatnonzero(((boxes[:, :2] > self.sizes[owner] + 1) | (boxes[:, 2:] < -1)).any(1))
        if len(outside):
            i, box = owner[outside[0]], boxes[outside[0]].tolist()
            raise InputError(f"{self.where(i)} is {self.sizes[i][0]} x {self.sizes[i][1]} px, and a box of it, {box}, "
                             "lies outside; correct the annotation, or the size that it states.")
        left = self.clipped(boxes, self.sizes[owner])
        # Crowds are no single objects. VOC's difficult ones are trained on, though nobody is asked for them.
        self._usable = (left[:, 2:] > left[:, :2] + SLIVER).all(1) & ~(self.everything.special & (self.rule == "coco"))

    @staticmethod
    def clipped(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """Boxes (M, 4) within images of (M, 2) or (2,) px: those of COCO overlap the edge by parts of a pixel."""
        return np.concatenate([boxes[:, :2].clip(0), np.minimum(boxes[:, 2:], sizes)], 1)

    def __getitem__(self, i: int) -> Image.Image:
        image = super().__getitem__(i)
        if image.size != tuple(self.sizes[i].tolist()):  # its boxes would lie elsewhere
            raise InputError(f"{self.where(i)} is {image.size[0]} x {image.size[1]} px, but its annotation says "
                             f"{self.sizes[i][0]} x {self.sizes[i][1]}; correct one of them.")
        return image

    def objects(self, i: int) -> Objects:
        return self.everything.at(slice(self.starts[i], self.starts[i + 1]))

    def targets(self, i: int) -> Objects:
        """What a detector is taught of an image: no crowds, nothing without an area, boxes cut at the edge."""
        found = self.objects(i).at(self._usable[self.starts[i]:self.starts[i + 1]])
        found.boxes = self.clipped(found.boxes, self.sizes[i])
        return found

    def mask(self, i: int, j: int) -> np.ndarray:
        """Of the j-th of `targets(i)`: (height, width) bool."""
        return decoded(self.targets(i).masks[j], *self.sizes[i])

    def subset(self, indices) -> "Boxes":
        at = np.asarray(indices, dtype=np.int64)
        rows = [np.arange(self.starts[i], self.starts[i + 1]) for i in at]
        return Boxes(self.name, self.split, self.items[at], root=self.root, sizes=self.sizes[at],
                     counts=[len(r) for r in rows], objects=self.everything.at(np.concatenate([*rows, []]).astype(int)),
                     classes=self.classes, rule=self.rule, ids=self.ids[at], category_ids=self.category_ids)

    def with_objects(self) -> "Boxes":
        """Without the images that have nothing to teach a detector."""
        usable = np.diff(np.append(0, np.cumsum(self._usable))[self.starts])
        if not usable.any():
            raise InputError(f"No image of {self.name} ({self.split}) has a box to learn from; see its annotations.")
        return self if (usable > 0).all() else self.subset(np.flatnonzero(usable))

    def as_coco(self) -> dict:
        """The annotations in COCO's form. Difficult objects of VOC become crowds: found or not, it does not matter."""
        everything = self.everything
        objects = [{"id": m + 1, "image_id": int(self.ids[i]), "category_id": self.category_ids[everything.classes[m]],
                    "bbox": [*box[:2], box[2] - box[0], box[3] - box[1]], "area": float(everything.areas[m]),
                    "iscrowd": int(everything.special[m]),
                    **({} if everything.masks is None else {"segmentation": json.loads(everything.masks[m])})}
                   for i in range(len(self)) for m in range(self.starts[i], self.starts[i + 1])
                   for box in [everything.boxes[m].tolist()]]
        images = [{"id": int(k), "file_name": f"{k:012d}.jpg", "width": int(w), "height": int(h)}
                  for k, (w, h) in zip(self.ids, self.sizes, strict=True)]
        names = [{"id": k, "name": name} for k, name in zip(self.category_ids, self.classes, strict=True)]
        return {"images": images, "annotations": objects, "categories": names}


# ---------------------------------------------------------------- reading


def find(name: str | Path, split: str) -> Boxes | None:
    """The set if `name` is that of the embedded one, or a folder in the layout of VOC or COCO; else None."""
    if name == "clothes_in_photos":
        from .clothes import clothes_in_photos

        return clothes_in_photos(split)
    root = expanded(name)
    root = root / "VOCdevkit" if (root / "VOCdevkit").is_dir() else root
    if any(root.glob("VOC[0-9][0-9][0-9][0-9]")):
        wanted = f"VOC*/ImageSets/Main/{'trainval' if split == 'train' else 'test'}.txt"
        lists = sorted(root.glob(wanted))
        if not lists:
            raise InputError(f"{root} has no list {wanted} for the split {split!r}; VOC's test has its own archive.")
        lists = lists if split == "train" else lists[:1]  # of 2012 no test annotations were published
        found = _voc(root, str(name), split, tuple((file, file.stat().st_mtime_ns) for file in lists))
    elif any(root.glob("annotations/instances_*.json")):
        file = root / "annotations" / f"instances_{'train' if split == 'train' else 'val'}2017.json"
        if not file.is_file():
            raise InputError(f"There is no {file} for the split {split!r}; put COCO's annotations of 2017 there.")
        found = _coco(root, str(name), split, file, file.stat().st_mtime_ns)
    else:
        return None
    if not Path(found.where(0)).is_file():
        raise InputError(f"The image {found.where(0)}, which the annotations of {name} name, is not there; put the "
                         "images beside them.")
    return found.with_objects() if split == "train" else found


@lru_cache(maxsize=4)  # a run asks several times, and reading takes seconds
def _voc(root: Path, name: str, split: str, lists: tuple) -> Boxes:
    classes, items, sizes, rows, counts = _voc_classes(root), [], [], [], []
    for file, _ in lists:
        year = file.parents[2]
        for word in file.read_text().split():
            size, found = _voc_objects(xml := year / "Annotations" / f"{word}.xml")
            if strange := next((row[4] for row in found if row[4] not in classes), None):
                unknown(f"class in {xml}, of which ImageSets/Main has no list,", strange, classes)
            items.append(f"{year.name}/JPEGImages/{word}.jpg")
            sizes.append(size)
            rows += [(*row[:4], classes.index(row[4]), row[5]) for row in found]
            counts.append(len(found))
    if not items:
        raise InputError(f"The list {lists[0][0]} is empty.")
    values = np.array(rows, np.float64).reshape(-1, 6)
    boxes = values[:, :4] - [1, 1, 0, 0]  # VOC counts pixels from 1 and names the last one
    objects = Objects(boxes, values[:, 4].astype(np.int64), values[:, 5] > 0, np.prod(boxes[:, 2:] - boxes[:, :2], 1))
    rule = "voc 11 points" if lists[0][0].parents[2].name == "VOC2007" else "voc area"
    return Boxes(name, split, items, root=root, sizes=np.array(sizes), counts=counts, objects=objects, classes=classes,
                 rule=rule, ids=range(1, len(items) + 1), category_ids=range(1, len(classes) + 1))


def _voc_classes(root: Path) -> list[str]:
    """Of both splits, so that they number them alike: those that have lists of their own beside the lists of all
    images; without such lists VOC's twenty, or where an annotation names another class, all that are named."""
    lists = [file for part in ("trainval", "test") for file in root.glob(f"VOC*/ImageSets/Main/*_{part}.txt")]
    if lists:
        return sorted({file.name.rpartition("_")[0] for file in lists})
    named = {row[4] for xml in sorted(root.glob("VOC*/Annotations/*.xml")) for row in _voc_objects(xml)[1]}
    return VOC_CLASSES if named <= {*VOC_CLASSES} else sorted(named)


def _voc_objects(file: Path) -> tuple[tuple[int, int], list[tuple]]:
    """Width and height, and of each object x1, y1, x2, y2, class, whether it is difficult."""
    try:
        tree = ElementTree.parse(file)
        size = tuple(int(tree.find("size").find(side).text) for side in ("width", "height"))
        rows = []
        for found in tree.findall("object"):
            corners = [float(found.find("bndbox").find(edge).text) for edge in ("xmin", "ymin", "xmax", "ymax")]
            rows.append((*corners, found.find("name").text.strip(), int(found.findtext("difficult", "0"))))
    except FileNotFoundError:
        raise InputError(f"There is no annotation {file}, which the list of images asks for.") from None
    except (ElementTree.ParseError, AttributeError, ValueError, TypeError) as error:
        raise InputError(f"{file} is no annotation of VOC ({error}); it needs size/width, size/height and, of every "
                         "object, name and bndbox/xmin, ymin, xmax, ymax.") from None
    return size, rows


@lru_cache(maxsize=4)
def _coco(root: Path, name: str, split: str, file: Path, changed: int) -> Boxes:
    try:
        data = json.loads(file.read_text())
        categories = sorted(data["categories"], key=lambda c: c["id"])
        number = {c["id"]: k for k, c in enumerate(categories)}
        images = sorted(data["images"], key=lambda image: image["id"])
        place = {image["id"]: i for i, image in enumerate(images)}
        found = sorted((a for a in data["annotations"] if a["image_id"] in place), key=lambda a: place[a["image_id"]])
        strange = next((a for a in found if a["category_id"] not in number), None)
        lost = next((a for a in data["annotations"] if a["image_id"] not in place), None)
        corners = np.array([a["bbox"] for a in found], np.float64).reshape(-1, 4)
        special = np.array([a.get("iscrowd", 0) for a in found], bool)
        areas = np.array([a.get("area", w * h) for a, (w, h) in zip(found, corners[:, 2:], strict=True)], np.float64)
        sizes = np.array([(image["width"], image["height"]) for image in images])
        files = [f"{file.stem.split('_')[1]}/{image['file_name']}" for image in images]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} is no annotation file of COCO ({type(error).__name__}: {error}); it needs images, "
                         "annotations and categories.") from None
    if strange:
        unknown(f"category_id in {file},", strange["category_id"], map(str, number))
    if lost or not images:
        raise InputError(f"{file} has {len(images)} images" + (f", none with the id {lost['image_id']} that an "
                         "annotation is for" if lost else "") + "; it is not whole.")
    masks = np.array([json.dumps(a["segmentation"]) for a in found] + [None], object)[:-1] \
        if found and all("segmentation" in a for a in found) else None
    corners[:, 2:] += corners[:, :2]
    counts = np.bincount([place[a["image_id"]] for a in found], minlength=len(images))
    objects = Objects(corners, np.array([number[a["category_id"]] for a in found], np.int64), special, areas, masks)
    return Boxes(name, split, files, root=root, sizes=sizes, counts=counts, objects=objects, rule="coco",
                 classes=[c["name"] for c in categories], ids=[i["id"] for i in images], category_ids=list(number))


# ---------------------------------------------------------------- writing


def write_voc(images: Boxes, folder: str | Path, year: int = 2007) -> Path:
    """The images as VOCdevkit/VOC{year} in `folder`, where an earlier call may have put the other split."""
    root = Path(folder) / "VOCdevkit" / f"VOC{year}"
    for part in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / part).mkdir(parents=True, exist_ok=True)
    names, split = [f"{k:06d}" for k in images.ids], "trainval" if images.split == "train" else "test"
    present = np.zeros((len(images), len(images.classes)), bool)
    for i, name in enumerate(names):
        images[i].save(root / "JPEGImages" / f"{name}.jpg", quality=95)
        tree = ElementTree.Element("annotation")
        size = ElementTree.SubElement(tree, "size")
        for tag, value in zip(("width", "height", "depth"), (*images.sizes[i], 3), strict=True):
            ElementTree.SubElement(size, tag).text = str(value)
        found = images.objects(i)
        present[i, found.classes] = True
        for box, k, special in zip(found.boxes + [1, 1, 0, 0], found.classes, found.special, strict=True):
            one = ElementTree.SubElement(tree, "object")
            for tag, value in (("name", images.classes[k]), ("pose", "Unspecified"), ("truncated", 0),
                               ("difficult", int(special))):
                ElementTree.SubElement(one, tag).text = str(value)
            corners = ElementTree.SubElement(one, "bndbox")
            for tag, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True):
                ElementTree.SubElement(corners, tag).text = f"{value:g}"
        ElementTree.ElementTree(tree).write(root / "Annotations" / f"{name}.xml")
    lists = {split: names}
    for c, column in zip(images.classes, present.T, strict=True):
        lists[f"{c}_{split}"] = [f"{name} {1 if on else -1:2d}" for name, on in zip(names, column, strict=True)]
    for name, rows in lists.items():
        (root / "ImageSets" / "Main" / f"{name}.txt").write_text("\n".join(rows) + "\n")
    return root.parent


def write_coco(images: Boxes, folder: str | Path) -> Path:
    """The images in COCO's layout in `folder`, where an earlier call may have put the other split."""
    root, split = Path(folder), "train2017" if images.split == "train" else "val2017"
    for part in ("annotations", split):
        (root / part).mkdir(parents=True, exist_ok=True)
    for i, k in enumerate(images.ids):
        images[i].save(root / split / f"{k:012d}.jpg", quality=95)
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(images.as_coco()))
    return root

