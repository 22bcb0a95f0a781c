"""The reference of all settings, in Markdown, from the schema.

`python -m dinoscale.config.reference > configs/README.md` rewrites the file in the repository.
"""

import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from dinoscale.config.load import describe_presets
from dinoscale.config.mistakes import kinds, sections
from dinoscale.config.schema import RunConfig
from dinoscale.config.sections.training import CurveConfig

_HEAD = """\
# Settings

<!-- Written by `python -m dinoscale.config.reference > configs/README.md`; do not edit. -->

One YAML file describes a run. What it leaves out has the default below, so a file states only what
differs. Unknown keys, wrong types and values out of range are refused, each with one sentence.

```bash
dinoscale presets                                                # every preset, in a line
dinoscale config vit_b16 data.train=/data/images --world-size 8  # settings, steps, rates on 8 GPUs
```

**Presets.** A preset is a file in `pretrain/`, and its name stands for its path:
`dinoscale train vit_s16`. `base/` and `model/` hold the parts that presets share, `sweep/` holds
[sweeps](sweep/README.md).

**Layers.** A file inherits from the files under `defaults`, given by a path relative to the file or
by the name of a preset:

```yaml
defaults: [vit_s16]  # of several, a later one wins over an earlier one
train:
  epochs: 300        # the file itself wins over its defaults
data:
  train: /data/images
```

`section.key=value` on the command line wins over all files: `optim.lr=1e-3`,
`crops.global_scale=[0.3,1.0]`, `eval.train=null`. Mappings merge; lists and scalars replace.
Another `model.backbone` drops the sizes given for the one before.

**Renamed settings.** An old name is refused with the new one; run directories, checkpoints and
tables of sweeps that hold old names are read.

## Phases

A run may have parts with settings of their own, such as a last one at a higher resolution:

```yaml
defaults: [dinov2_vitl16]
data: {train: /data/images}
run_dir: runs/first
phases:
- name: pretrain
- name: high_resolution
  change:              # settings that differ from the file's
    crops: {global_size: 416}
    dino: {warmup_teacher_temp_epochs: 2}
    optim: {lr: 1e-3, warmup_epochs: 0}
    train: {epochs: 8}
```

`dinoscale train` with this file trains one after the other, each in a folder of its own below
`runs/first/phases`, and goes on exactly wherever it was interrupted, with the first phase that is
not finished. A phase begins with the whole state of the one before (`start: everything`): weights,
moments and centers, with position embeddings resized to its crops; its schedules run from their
start to their end. It has the next seed, so that it sees the images in another order. With
`start: teacher` both networks begin as the teacher of the phase before, with a new optimizer.
`after: pretrain` begins at the end of that phase instead of the one before: two phases after the
same one see the same images in the same order, so that what they change is compared, and the report
draws them side by side. A phase's checkpoints and curves are those of any run, and commands that
take a run take the last phase that has a checkpoint, also where another began at the same place;
`runs/first/phases/01_pretrain` names one. On the command line,
`phases.high_resolution.train.epochs=4` changes one of them, and `phase=high_resolution` chooses it
for a command:
`dinoscale bench step my.yaml phase=high_resolution`.

What a phase changes wins over a setting on the command line that does not name the phase. In
`gram.teacher` and `distill.teacher` of a phase, `{run_dir}` is the folder of the whole run: with
`gram: {teacher: "{run_dir}/phases/01_pretrain"}` the Gram network is the teacher at the end of the
first phase, wherever the run is written, and `01_pretrain/checkpoints/step_00200000` is that of
one of its checkpoints, which stays there. Weights that no earlier phase writes have to be there
when the run starts.

`train.continue_from=runs/other` begins with the whole state of any other run of the same network;
give it another `seed`, or it sees the images in the order in which that run began.

## Mixed sizes of crops

```yaml
defaults: [dinov2_vitl16]
gram: {loss_weight: 1.0, teacher: weights.pth}
crops:
  mixture:  # each step draws one of these
  - {weight: 0.3, global_size: 512, local_size: 112, gram_crop_size: 768}
  - {weight: 0.7, global_size: 768, local_size: 224, gram_crop_size: 1152}
```

Which one is a function of (seed, step): all ranks and micro-batches of a step have the same, and
so has a resumed run. `crops.global_size` and `crops.local_size` are then the largest ones and may
be left out; those that a file inherits, or that a phase changes, give way to the mixture, and so
does `gram.crop_size`. An empty list takes a mixture back, and sizes have to be given with it. A run
cannot resume with another mixture. `plan` gives the memory of the largest sizes and the mean time,
`bench step` and `bench data` measure the largest alone, and log lines hold the sizes of their step.
The last phase of `dinov3_vit7b16` has the five published sizes.

## Distillation

```yaml
defaults: [dinov2_vits16]       # the student
run_dir: runs/vits16_of_vitl14
model: {drop_path_rate: 0.0}
head: {num_prototypes: 131072}  # as many as the teacher's
patch_head: {num_prototypes: 131072, norm_last_layer: false}
dino: {targets: sinkhorn_knopp, teacher_temp: 0.07, warmup_teacher_temp_epochs: 0}
ibot: {mask_prob: 1.0}          # patch targets in both global crops
distill:
  teacher: runs/dinov2_vitl14   # a run, one of its checkpoints, or a teacher_checkpoint.pth
  model: {backbone: vit_large_patch16_224, patch_size: 14, ffn: swiglu, layer_scale: 1e-5}
  head: {num_prototypes: 131072, bottleneck_dim: 384, norm_last_layer: false}
  patch_head: {num_prototypes: 131072, norm_last_layer: false}
```

`dinoscale train` with this file trains a small student of a larger, frozen teacher, as DINOv2 and
DINOv3 made their small models: `dino`, `ibot` and `koleo` as ever, with the outputs of the frozen
teacher and its heads as targets. The student sees its whole crops; the patch loss is taken at the
patches that `ibot` draws. The student's average is updated as ever, and is what k-NN measures and
`convert` exports. DINOv2 takes the patch loss on both global crops, hence `ibot.mask_prob=1.0`,
which draws patches in each of them; DINOv3 takes it at the patches drawn as ever, with the default
0.5 in half of the crops. Both papers set `model.drop_path_rate=0.0`, and DINOv3's example keeps the
teacher's temperature at 0.07: a run that has either otherwise is warned at its start.

`distill.model`, `distill.head` and `distill.patch_head` say what the teacher is, as the sections of
the same name do in the `config.yaml` of its run; what is left out is as the student's. It may be of
any width, depth, layers and heads; only the numbers of prototypes have to agree, and its patches to
fit into the global crops. Patches of another size are resized, as features, to the student's grid.
Of weights without heads, such as released backbones,
[the features](#learning-the-features-of-a-larger-backbone) can be learned. Batch norm in the
teacher takes the statistics that it has tracked. At stage 3 the teacher is sharded; below, each
rank holds all of it.
`plan` counts its memory, its forward and its transfers.

Checkpoints hold a digest of the teacher in place of its weights: they are read at every start, and
a run that has learnt from others is not resumed. They may have moved, or be in another format.
A run that continues from one with another teacher of heads, or with none, begins with new centers.
With batch norm in the student the average takes a forward of its own for each micro-batch, as its
statistics follow the images. A teacher with learned positions under a
mixture of sizes is resized to the largest one and from there to each; the log says what that
changes of its features, which is nothing if the largest is the size of the weights.

### Several students of one teacher

```bash
torchrun --nproc-per-node 8 -m dinoscale embed --targets vit_s16 targets/ \\
  distill.teacher=runs/first data.train=/data/images
CUDA_VISIBLE_DEVICES=0,1,2,3 torchrun --nproc-per-node 4 -m dinoscale train vit_s16 \\
  distill.targets=targets/ data.train=/data/images run_dir=runs/student_a
CUDA_VISIBLE_DEVICES=4,5,6,7 torchrun --nproc-per-node 4 --master-port 29501 -m dinoscale train \\
  vit_s16 distill.targets=targets/ data.train=/data/images run_dir=runs/student_b optim.lr=0.001
```

The first command takes the configuration of a student with `distill.teacher`, walks its steps, and
stores what the teacher finds in the crops of each. Any number of students then learn from the
folder, at the same time or not, each a job of its own with its optimizer, average and checkpoints:
`distill.targets` stands in place of `distill.teacher`, and the rest of the section stays as it was.
No job builds the teacher, or waits for it; `plan` counts none. Why one job does not hold several
students is said in [dinoscale](../dinoscale/README.md#several-students-are-several-jobs).

Of heads the folder has what meets the prototypes, in float32, and the prototypes: temperature,
centering and Sinkhorn-Knopp act in each student as ever. Without heads it has the features, in
`engine.precision`. A student is bit for bit that of the live teacher, as tests show, where both
multiply the same shapes: with the micro-batches of the folder, on any number of ranks, in float32
also at stage 3. With other micro-batches it is the same up to rounding; of smaller ones every rank
reads, checks and holds whole files of the folder for its part of them, so that eight ranks with an
eighth of the images read each file eight times. A run may go on with its teacher's targets where it
began with the teacher, and the other way round.

Students share whatever decides the crops, and a run that differs is refused by name: `seed`,
`train.batch_size`, the images and how many are drawn, `crops`, `augment`, `engine.precision`, for
patches `model.patch_size` and what `ibot` draws, and no more steps than are stored. They
differ in anything else: backbone, adapters, rates, momentum, temperatures, micro-batch, ZeRO stage,
ranks. Mixed sizes of crops are stored as they are drawn; of a run of phases add `phase=NAME`. A
Gram loss, `train.micro_batch_size=auto` and `train.max_rollbacks` do not go with stored targets.
Each file has a checksum, read when its steps come near. Each micro-batch is compared with what the
targets are of: the numbers of its images, a CRC-32 of the decoded pixels of its global crops and of
what was drawn for them, and the chosen patches. So other contents of a file, another decoder, and
an image that could be read only then or only now end the run with a sentence. A killed command goes
on where it was when it is started again, and writes anew what the folder has lost; ranks share each
step, and their number changes no byte as long as micro-batches stay as large. Damaged images are
replaced, and count against `data.max_bad_fraction`, as in training; `unreadable` in `manifest.json`
lists them. Leave them as they are until all students are trained: one that can be read when a
student starts is refused, and named with the files to remove before the command is started again.
An image that a failing file system withholds, and that may be intact, ends the command (exit code
69). A later phase may name targets, too, with `{run_dir}` as for a teacher; they have to be
finished, and of its settings, when the first one starts.

Bytes of an image in an epoch, and of ImageNet-1k's 1.28 M; what it takes is said before it begins,
and a disk with less space is refused:

| stored | kB per image | GB per epoch |
| --- | --- | --- |
| class tokens of heads, bottleneck 256 | 2 | 3 |
| with patches, 16 x 16 of a crop, `ibot.mask_prob=0.5` | 81 | 104 |
| the same, `ibot.mask_prob=1.0` | 160 | 205 |
| class features, width 1024, bf16 | 4 | 5 |
| with patch features, 14 x 14, the same grid as the teacher's | 807 | 1030 |
| the same, resized from another grid (float32) | 1610 | 2060 |

It pays where a teacher is much larger than its students, or there are several: the teacher's
forward, which costs more than a small student's whole step, is taken once. It does not pay for one
student, whose teacher fits beside it, or where the disk reads fewer bytes than images per second
times the table's. K epochs take K times the space, and all students see the crops of one seed.

## Staying near released weights

With `anchor.class_weight` or `anchor.patch_weight` above 0, features of the student's global crops
stay near those of the network as the run began, the anchor: the loss has a term 1 - cosine of the
features after the final norm, which is 0 in the first step, in bf16 up to its rounding. Crops
chosen to be masked do not count, as they are other pictures than the anchor sees. The student needs
no further forward; the anchor's own, over the global crops, takes as long as the teacher's. In
phases, the anchor is that of the first one that has it. What a weight is worth on your images has
to be measured: `anchor_class_loss` and `anchor_patch_loss` in `metrics.jsonl` say how far the
features have moved, and k-NN or `guard` what became of them.

## Learning the features of a larger backbone

```yaml
defaults: [vit_s16]  # the student
distill:
  teacher: dinov2_vitl14_pretrain.pth
  model: {backbone: vit_large_patch14_dinov2}
  class_feature_weight: 1.0
  patch_feature_weight: 1.0
dino: {loss_weight: 0.0}
crops: {num_local: 0}
```

Released backbones have no heads. Their features can be learned all the same, which no paper of
DINO's does: this term is ours. The teacher is frozen and of any width, depth and patch size: all
that `evaluate` reads; `distill.model` says which. It sees the student's global crops, normalised as
the run's are, so their side is a multiple of its patches. The student's features, class token and
patches after the final norm, pass a linear map to the teacher's width, one for each kind; another
grid of the teacher's is resized bilinearly to the student's, with antialias to a coarser one.
`distill.feature_loss` is the distance, and its terms in `metrics.jsonl` are `class_feature_loss`
and `patch_feature_loss`.

Convolutional teachers are `resnet18` to `resnet152`, and `convnext_atto` to `convnext_xlarge`, of
which DINOv3 has tiny, small, base and large: `model: {backbone: convnext_tiny}`. Read are files of
timm, of torchvision's ResNets and of ConvNeXt's and DINOv3's authors, and folders of transformers'
`DINOv3ConvNextModel`, as they lie on Hugging Face's hub. Class features are what timm's
`forward_head(..., pre_logits=True)` returns, patch features the last map, one place for 32 x 32
pixels, of a ConvNeXt through its final norm, as DINOv3 has it. Global crops are then whole such
places, but for class features of a ResNet. Batch norm takes the statistics that it has tracked.
Students are ViTs, or ResNet-50 for class features.

These terms stand beside those of `dino` and `ibot`, whose targets are then the average's as ever;
crops that `ibot` chooses to mask do not count. With `dino.loss_weight` 0 and no patch loss there
are no heads, no prototypes and no watch for a collapse, and without local crops an image costs two
crops of the student and two of the teacher. The maps train with the student and are averaged with
it; checkpoints have them, exported weights do not, and a phase with `start: teacher`, or
`train.init_head=true` with a run, takes them along. The teacher's weights are read at every start,
sharded at stage 3, not in the checkpoints, and have to be the same when a run resumes.

## Training a part of the weights

`lora.rank=8` trains adapters of that rank beside the matrices of all blocks, with the heads and the
mask token, and if wanted the norms and the patch projection; `optim.trained_blocks=4` trains the
last four blocks as they are. The rest of the backbone stays as it began, without gradient, moments
and average, and student and teacher share its s bytes a weight; `plan` says what that leaves.
Activations take as much memory as ever. At stage 3 it is refused. Exported weights, and those that
`evaluate` and `train.init_from` read, have the adapters merged in; a resumed run keeps them apart.
`optim.backbone_lr` and `optim.layer_decay` act on adapters as on the weights beside them.

## Micro-batches

`train.batch_size` counts the images of a step over all ranks. `train.micro_batch_size=auto`
tries, in processes of their own before the training, which share of it each rank can take at once
without running out of memory, and accumulates gradients over the rest. What it finds is written
to the run's `config.yaml`; a resumed run keeps it as long as it divides the images of a rank.

## Which ZeRO stage

P parameters of s bytes (2 in bf16), W ranks. The teacher costs 4P/W + sP bytes per rank at stages
0 to 2 and (4 + s)P/W at stage 3, plus padding. Stage 2 is the default and right for ViT-S to
ViT-L. Stage 3 is for models or GPUs where the weights themselves do not fit, together with
`engine.checkpoint_every_k_blocks=1`. A CPU without bf16 instructions multiplies in float32 and
rounds to bf16: there both types are about as fast, and bf16 keeps half the activations.

## Time and memory of the blocks

- `engine.compile` (`auto`: on a GPU only) compiles one block for all, at every ZeRO stage. The
  first step then takes a minute longer. Where the compiler fails, one warning says why and
  training goes on uncompiled. Evaluation is never compiled.
- `engine.checkpoint_every_k_blocks=1` (or 2, 3, ...) recomputes every k-th block in the backward
  pass. `engine.recompute` says what of it: `pointwise` keeps the outputs of products and
  attention and recomputes norms and activations, which saves memory in compiled blocks only: the
  others always do so; `all_but_attention` keeps the attention's output only; `block` keeps
  nothing. Without `engine.compile` no bit of the result changes. What each costs and saves is in
  [tests](../tests/README.md#activation-checkpointing).
- `model.drop_path_mode=subset` does not compute dropped branches. Of each micro-batch a fixed
  number of images drops a branch, so results depend on how a batch is split. The reference's
  rule, each image by itself, is the default.

Sources: [C] the code of Caron et al. 2021 (arXiv:2104.14294), [P] the paper, [D] this project.

## Presets

| preset | what it is |
| --- | --- |
"""
_CURVE = "schedules.lr"  # stands for all curves
_TABLE = "| setting | value | default | meaning |\n| --- | --- | --- | --- |\n"
_KINDS = {
    "integer": "integer",
    "number": "number",
    "string": "text",
    "boolean": "`true`, `false`",
    "null": "`null`",
}


def reference() -> str:
    """The whole page: presets, then a table of settings for each section."""
    presets = (f"| `{name}` | {_cell(text)} |\n" for name, text in describe_presets().items())
    tables = [_section("Top level", "", RunConfig)]
    parts = _parts()
    tables += [_section(f"`{key}`", f"{key}.", part) for key, part in parts.items()]
    curve = _section(f"`{_CURVE}` and every other curve", f"{_CURVE}.", CurveConfig)
    tables.insert(2 + list(parts).index("schedules"), curve)
    return _HEAD + "".join(presets) + "".join(tables)


def _parts() -> dict[str, type[BaseModel]]:
    """Every section by its key, and after it those that may be missing inside it."""
    found: dict[str, type[BaseModel]] = {}
    for key, part in sections().items():
        found[key] = part
        for name, field in part.model_fields.items():
            for kind in kinds(field.annotation) - {CurveConfig, *found.values()}:
                if isinstance(kind, type) and issubclass(kind, BaseModel):
                    found[f"{key}.{name}"] = kind
    return found


def _section(title: str, prefix: str, part: type[BaseModel]) -> str:
    schema, inner = part.model_json_schema(), sections(part)
    rows = "".join(
        f"| `{prefix}{key}` | {_cell(_kind(field, schema))} | {_default(field)} |"
        f" {_cell(field['description'])} |\n"
        for key, field in schema["properties"].items()
        if key not in inner
    )
    return f"\n## {title}\n\n{schema['description']}\n\n{_TABLE}{rows}"


def _default(field: Mapping[str, Any]) -> str:
    return f"`{_plain(field['default'])}`" if "default" in field else "none"


def _kind(field: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    """Type and allowed values, in words."""
    if "enum" in field:
        return ", ".join(f"`{_plain(value)}`" for value in field["enum"])
    if "const" in field:
        return f"`{_plain(field['const'])}`"
    for union in ("anyOf", "oneOf"):
        if union in field:
            return " or ".join(_kind(choice, schema) for choice in field[union])
    if "$ref" in field:  # a section that may be missing
        name = field["$ref"].rpartition("/")[2]
        like = [key for key, part in _parts().items() if part.__name__ == name]
        return f"settings as in `{like[0]}`" if like else "a curve, as below"
    if field["type"] == "array":
        items = field.get("prefixItems") or [field["items"]]
        count = f"{len(items)} " if "prefixItems" in field else ""
        return f"list of {count}{_items(items[0], schema)}"
    return f"{_KINDS[field['type']]} {_range(field)}".rstrip()


def _items(item: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    if "$ref" in item:
        name = item["$ref"].rpartition("/")[2]
        return f"mappings of {' and '.join(schema['$defs'][name]['properties'])}"
    return f"{_KINDS[item['type']]}s {_range(item)}".rstrip()


def _range(field: Mapping[str, Any]) -> str:
    """Bounds, such as `>= 1` or `in [0, 1)`."""
    low = field.get("minimum", field.get("exclusiveMinimum"))
    high = field.get("maximum", field.get("exclusiveMaximum"))
    if low is None:
        return ""
    if high is None:
        return f"{'>=' if 'minimum' in field else '>'} {low}"
    left, right = "[" if "minimum" in field else "(", "]" if "maximum" in field else ")"
    return f"in {left}{low}, {high}{right}"


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _cell(text: str) -> str:
    """One line, with nothing that ends a cell."""
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    print(reference(), end="")
