"""The rules of verify: what each looks for, how much it matters, and to whom.

A rule about values whose threshold no publication backs is a note and fails no run by default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

Severity = Literal["note", "warning", "error"]
Profile = Literal["ldm", "a1111", "comfyui", "diffusers", "kohya", "strict"]
Group = Literal[
    "container", "structure", "position-ids", "dtypes", "values", "metadata", "embedding", "folder", "manifest",
    "signature",
]  # fmt: skip

PROFILES: tuple[Profile, ...] = get_args(Profile)

_OFF = None


@dataclass(frozen=True, slots=True)
class Rule:
    """A thing that is looked for.

    Attributes:
        id: What it is called, always the same.
        group: What it is about.
        severity: Of its findings unless the profile says otherwise.
        title: What a finding means, in a few words.
        help: Why it matters, and to whom.
        profiles: Other severities in some profiles; ``None`` where the profile's programs don't mind.
        gap: Whether a finding means that something could not be checked.
    """

    id: str
    group: Group
    severity: Severity
    title: str
    help: str
    profiles: Mapping[str, Severity | None] = field(default_factory=dict)
    gap: bool = False

    def severity_in(self, profile: str) -> Severity | None:
        """How much it matters to a profile; ``None`` where it doesn't."""
        if profile in self.profiles:
            return self.profiles[profile]
        if profile == "strict" and self.group != "values":
            return {"note": "warning", "warning": "error", "error": "error"}[self.severity]  # type: ignore[return-value]
        return self.severity


_LIST = (
    # ---------------------------------------------------------------- container
    Rule(
        "container-unreadable", "container", "error", "The file can't be read",
        "It isn't there, or the system refuses to read it.", gap=True,
    ),
    Rule(
        "container-corrupt", "container", "error", "The file contradicts itself",
        "A truncated download, a lying header, overlapping tensors, bytes that belong to nothing, an index that names "
        "tensors which its shards don't have.", gap=True,
    ),
    Rule(
        "container-hostile", "container", "error", "The file asks for what only an attack needs",
        "A pickle that names functions such as os.system, or a folder with a link that leads out of it.", gap=True,
    ),
    Rule(
        "container-unsupported", "container", "error", "Nothing that can be checked",
        "Another format, or no model at all.", gap=True,
    ),
    Rule(
        "container-suffix", "container", "warning", "The name promises another container",
        "Loaders choose by the suffix: a torch pickle called .safetensors loads nowhere.",
    ),
    Rule(
        "pickle", "container", "note", "The weights are a pickle",
        "Reading one with torch can run whatever it names; hubs and webuis warn of it.",
    ),
    Rule(
        "non-tensors", "container", "warning", "The file holds more than tensors",
        "What a training run left behind, such as an optimizer's state or callbacks. Loaders of weights only refuse "
        "a pickle that names unknown classes.",
    ),
    Rule(
        "file-unused", "folder", "note", "A file in the folder that nothing loads",
        "Another variant, another format, a hidden file: it is downloaded with the model.",
    ),
    # ---------------------------------------------------------------- structure
    Rule(
        "family-unknown", "structure", "error", "No model that is known",
        "No component of Stable Diffusion is in it, or its parts belong to different families: nobody can say what it "
        "should hold.", gap=True,
    ),
    Rule(
        "component-unknown", "structure", "warning", "A component of an unknown kind",
        "It can't be told which weights it should have.", gap=True,
    ),
    Rule(
        "component-missing", "structure", "error", "A component is missing",
        "The model's family has it, and a loader of whole models leaves it random, or fails.",
        {"comfyui": "warning"},
    ),
    Rule(
        "weight-missing", "structure", "error", "A weight is missing",
        "diffusers leaves it at random values or on the meta device without an error, A1111 at random.",
    ),
    Rule(
        "weight-shape", "structure", "error", "A weight has the wrong shape",
        "It doesn't fit the rest of its component, or the folder's config.",
    ),
    Rule(
        "weight-kind", "structure", "error", "A weight that is no float",
        "Integers, booleans or complex numbers where a network has floats: no loader computes with them.",
    ),
    Rule(
        "key-wrapped", "structure", "error", "All keys have a prefix that no loader expects",
        "What a parallel trainer leaves in front of the names, such as 'module.'.",
    ),
    Rule(
        "key-duplicate", "structure", "warning", "A weight is there twice",
        "Under two names of one weight; which one a loader takes depends on the loader.",
    ),
    Rule(
        "key-unknown", "structure", "warning", "A key that the family doesn't have",
        "Ignored by some loaders, refused by strict ones, and carried along by merges.",
        {"a1111": "note", "comfyui": "note"},
    ),
    Rule(
        "key-dialect", "structure", "warning", "The text encoder's keys lack 'text_model.'",
        "As old anime models have them, and files made of what transformers 5 saves: diffusers' from_single_file "
        "fails, transformers before 5 loads a random encoder from such a folder, and only warns. The webuis mend it "
        "as they load.",
        {"a1111": "note", "comfyui": "note", "kohya": "error"},
    ),
    Rule(
        "ema-incomplete", "structure", "note", "The EMA weights are not whole",
        "They can't take the UNet's place.",
    ),
    Rule(
        "leftovers", "structure", "note", "Training leftovers",
        "EMA weights, losses, an optimizer's state: gigabytes that nobody needs to draw with.",
    ),
    Rule(
        "vae-family", "structure", "error", "Another family's VAE",
        "The VAEs of SD and SDXL have the same keys and shapes and differ in the scale of their latents (0.18215 "
        "against 0.13025): a wrong one loads everywhere and draws in wrong colours.",
    ),
    Rule(
        "vae-figure", "values", "warning", "The VAE resembles one of another family",
        "A figure computed from its values is the one published for a known VAE whose latents have another scale. It "
        "is no hash: of all VAEs, about one in a thousand would match one of those figures by chance.",
    ),
    Rule(
        "vae-half", "dtypes", "note", "SDXL's VAE in half precision",
        "The original SDXL VAE overflows in fp16 and draws black pictures unless the loader computes it in fp32; "
        "sdxl-vae-fp16-fix doesn't. The two can't be told apart by shapes.",
    ),
    # ---------------------------------------------------------------- position ids
    Rule(
        "position-ids-missing", "position-ids", "warning", "The CLIP position ids are missing",
        "A1111's older tools reject such a model, and with strict loading transformers before 4.31 does.",
        {"comfyui": _OFF, "diffusers": _OFF, "kohya": _OFF},
    ),
    Rule(
        "position-ids-wrong", "position-ids", "error", "Wrong CLIP position ids",
        "A merge scaled them as if they were weights. Loaders that take them from the file (ldm, A1111, kohya) see "
        "other words than were written; diffusers ignores them, so that its pictures differ from theirs.",
        {"diffusers": "warning"},
    ),
    Rule(
        "position-ids-dtype", "position-ids", "warning", "CLIP position ids of another dtype",
        "The values are right, but a cast turned them into floats: the next merge or cast breaks them.",
        {"comfyui": "note", "diffusers": "note"},
    ),
    Rule(
        "position-ids-unneeded", "position-ids", "note", "Position ids that the layout doesn't hold",
        "They are right, and transformers ignores them since 4.31; folders saved before carry them. A strict load of "
        "the text encoder alone fails.",
    ),
    Rule(
        "position-ids-stray", "position-ids", "warning", "Position ids where none belong",
        "An OpenCLIP text encoder has none, and no loader looks for them elsewhere.",
        {"comfyui": "note"},
    ),
    # ---------------------------------------------------------------- dtypes
    Rule(
        "dtype-asked", "dtypes", "error", "A weight of another dtype than asked for",
        "See --dtype.",
    ),
    Rule(
        "dtype-mixed", "dtypes", "note", "A component of several dtypes",
        "Such as an fp16 UNet with some fp32 layers: usually what a patch or a partial merge left.",
    ),
    Rule(
        "schedule-dtype", "dtypes", "warning", "Schedule buffers in half precision",
        "Loaders that take them from the file compute the noise levels from them: fp16 has three digits. Published "
        "fp16 files keep them in fp32.",
        {"diffusers": _OFF, "comfyui": _OFF},
    ),
    # ---------------------------------------------------------------- values
    Rule(
        "value-nan", "values", "error", "NaN in a weight",
        "Every picture comes out black, or fails.",
    ),
    Rule(
        "value-infinite", "values", "error", "Infinity in a weight",
        "Usually an overflow in a cast to fp16; it becomes NaN in the first layer that subtracts or normalises it.",
    ),
    Rule(
        "value-unread", "values", "warning", "Values of a type that can't be read",
        "Elements of four or six bits, or complex halves: nobody can say whether they are sound.", gap=True,
    ),
    Rule(
        "value-overflow", "values", "warning", "Values beyond fp16",
        "They become infinite as soon as somebody loads the model in half precision, which most programs do.",
    ),
    Rule(
        "value-constant", "values", "note", "A weight whose elements are all the same",
        "All zero, or all one value, in a convolution or a matrix: no training leaves that. No publication says how "
        "often it is meant, so it is a note.",
    ),
    Rule(
        "value-denormal", "values", "note", "Mostly denormal values",
        "More than half of a weight's elements are too small for full precision: usually a cast of something that was "
        "scaled down. No publication gives a threshold, so it is a note.",
    ),
    Rule(
        "schedule-values", "values", "warning", "A noise schedule that is none",
        "alphas_cumprod falls from nearly one to nearly zero, and the other buffers follow from it; a merge that adds "
        "or subtracts models breaks that.",
        {"diffusers": _OFF, "comfyui": _OFF},
    ),
    # ---------------------------------------------------------------- metadata
    Rule(
        "metadata-hash", "metadata", "warning", "The metadata state a false hash",
        "modelspec.hash_sha256 or sshs_model_hash isn't that of the tensors in the file: whoever looks the model up by "
        "it finds another one, or none.",
    ),
    Rule(
        "metadata-architecture", "metadata", "warning", "The metadata state another architecture",
        "modelspec.architecture isn't the family that the weights are of.",
    ),
    Rule(
        "metadata-modelspec", "metadata", "note", "ModelSpec metadata that aren't whole",
        "ModelSpec 1.0.1 asks for an architecture, an implementation, a title and a resolution.",
    ),
    # ---------------------------------------------------------------- embedding
    Rule(
        "embedding-width", "embedding", "error", "Vectors of a width that no text encoder has",
        "Those of the published models take 768 (SD1, and SDXL's clip_l), 1024 (SD2) or 1280 (SDXL's clip_g). With "
        "others, diffusers refuses to load an embedding, ComfyUI leaves it out, and so does the webui.",
    ),
    Rule(
        "embedding-vectors", "embedding", "error", "A number of vectors that makes no sense",
        "None at all, or another number for each of SDXL's text encoders: both read the same tokens, and the webui "
        "counts those of clip_g alone.",
    ),
    Rule(
        "embedding-zero", "embedding", "warning", "A vector of zeros",
        "The webui begins with those where no first words are given: it was never trained.",
    ),
    # ---------------------------------------------------------------- folder
    Rule(
        "config-missing", "folder", "error", "A component without a config",
        "from_pretrained can't load it.", {"a1111": "warning", "comfyui": "warning"},
    ),
    Rule(
        "config-contradicts", "folder", "error", "A config that isn't that of the weights",
        "The config states other sizes than the weights have: from_pretrained refuses to load, or makes up what is "
        "missing.",
    ),
    Rule(
        "tokenizer", "folder", "error", "A tokenizer that doesn't load",
        "Without vocab.json and merges.txt, or tokenizer.json, there is none.",
    ),
    Rule(
        "tokenizer-old", "folder", "note", "A tokenizer for new programs alone",
        "transformers before 5 reads vocab.json and merges.txt, not tokenizer.json alone.",
    ),
    Rule(
        "tokenizer-length", "folder", "warning", "A tokenizer without a limit",
        "Without model_max_length: 77 in tokenizer_config.json, generating a picture ends in an error.",
    ),
    Rule(
        "tokenizer-vocabulary", "folder", "note", "Tokenizer and text encoder disagree about the tokens",
        "The text encoder has another number of tokens than the tokenizer: some have no embedding, or an embedding has "
        "no token. Models with added tokens are meant so.",
    ),
    Rule(
        "config-invalid", "folder", "error", "A config that no library accepts",
        "A class that doesn't exist, a number of heads or groups that doesn't divide the width: from_pretrained fails.",
    ),
    Rule(
        "index-missing", "folder", "error", "The index names a part that isn't there",
        "from_pretrained fails.",
    ),
    Rule(
        "index-class", "folder", "warning", "The index names a class of another family",
        "from_pretrained fails, or loads what draws something else.",
    ),
    # ---------------------------------------------------------------- manifest
    Rule("tensor-missing", "manifest", "error", "A tensor of the manifest is missing", "The model isn't whole."),
    Rule(
        "tensor-type", "manifest", "error", "A tensor of another dtype or shape than in the manifest",
        "The model was cast or rebuilt.",
    ),
    Rule("tensor-changed", "manifest", "error", "A tensor with other values than in the manifest", "One bit counts."),
    Rule("tensor-added", "manifest", "error", "A tensor that isn't in the manifest", "Somebody added it."),
    Rule("file-missing", "manifest", "error", "A file of the manifest is missing", "The folder isn't whole."),
    Rule("file-changed", "manifest", "error", "A file with another SHA-256 than in the manifest", "Metadata count."),
    Rule("file-added", "manifest", "error", "A file that isn't in the manifest", "Somebody added it."),
    # ---------------------------------------------------------------- signature
    Rule(
        "signature-invalid", "signature", "error", "The signature isn't valid",
        "Another key made it, or the list of files in it was changed.",
    ),
    Rule(
        "signature-file", "signature", "error", "A file isn't as it was signed",
        "Its digest differs, it is missing, or it was not there when the model was signed.",
    ),
)  # fmt: skip

RULES: Mapping[str, Rule] = {rule.id: rule for rule in _LIST}
"""Every rule by its id."""
