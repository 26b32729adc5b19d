"""The file of a probe: one safetensors file. Its header describes the content and holds its fingerprint."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ib_callback.common import json_lines
from ib_callback.common.errors import ProbeError
from ib_callback.common.files import expanded, is_remote, write_atomically
from ib_callback.common.optional import require
from ib_callback.probe.content import Content, fingerprint, normalised

FORMAT_VERSION = 1
_LABELS = "labels/"
# Checksum of the header, because the fingerprint covers only the content.
_CHECKSUM = "header_sha256"


def write(path: str | os.PathLike[str], content: Content) -> None:
    """Write normalised content in one step: readers see the whole old file or the whole new one.

    Missing folders are made.
    """
    safetensors = require("safetensors.torch", extra="hf", purpose="Saving a probe")
    tensors = {"input_ids": _compact(content.input_ids), "attention_mask": content.attention_mask}
    tensors |= {_LABELS + name: _compact(label) for name, label in content.labels.items()}
    metadata = {
        "format_version": str(FORMAT_VERSION),
        "name": content.name,
        "source": json.dumps(content.source, sort_keys=True),
        "fingerprint": fingerprint(content.input_ids, content.attention_mask, content.labels),
    }
    if content.tokenizer is not None:
        metadata["tokenizer"] = content.tokenizer
    if content.groups is not None:
        metadata["groups"] = json.dumps(content.groups)
    if content.num_bytes is not None:
        metadata["num_bytes"] = str(content.num_bytes)
    if content.label_names:
        metadata["label_names"] = json.dumps(content.label_names, sort_keys=True)
    metadata[_CHECKSUM] = _checksum(metadata)
    path = _local(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, safetensors.save(tensors, metadata))


def read(path: str | os.PathLike[str]) -> Content:
    """Read the content of a probe file, and verify that it is what was saved.

    Raises:
        ProbeError: not a probe file, damaged, changed, or of a newer format.
        FileNotFoundError: there is no such file.
        OSError: there is no permission to read the file.
    """
    safetensors = require("safetensors", extra="hf", purpose="Loading a probe")
    path = _local(path)
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):  # opening a pipe would wait for whoever writes to it
            raise _refusal(path, f"it is {_kind(mode)}, not a file")
        with open(path, "rb"):  # safetensors would say of a file that may not be read that there is none
            pass
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path}: this probe file does not exist. Make a probe and save it: probe.save(path)."
        ) from None
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            _check_header(path, metadata)
            tensors = {key: _bytes_of_bool(file.get_tensor(key)) for key in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise _refusal(path, f"it is not a safetensors file, or it is incomplete ({error})") from error
    labels = {key.removeprefix(_LABELS): label for key, label in tensors.items() if key.startswith(_LABELS)}
    if tensors.keys() - {_LABELS + name for name in labels} != {"input_ids", "attention_mask"}:
        raise _refusal(path, f"expected input_ids, attention_mask and labels/…, got {sorted(tensors)}")
    ids, mask = tensors["input_ids"], tensors["attention_mask"]
    expected, found = metadata["fingerprint"], fingerprint(ids, mask, labels)
    if found != expected:
        raise _refusal(path, f"it was damaged or changed: expected fingerprint {expected}, got {found}")
    content = Content(
        input_ids=ids,
        attention_mask=mask,
        labels=labels,
        label_names=_entry(path, metadata, "label_names"),
        groups=_entry(path, metadata, "groups"),
        name=metadata.get("name", ""),
        source=_source(path, metadata),
        tokenizer=metadata.get("tokenizer"),
        num_bytes=_entry(path, metadata, "num_bytes"),
    )
    try:
        return normalised(content)
    except (ValueError, TypeError) as error:
        raise _refusal(path, f"its content is not a probe: {str(error).rstrip('.')}") from error


def _entry(path: str | os.PathLike[str], metadata: dict[str, str], name: str) -> Any:
    """Parse an entry of the header as JSON; None if there is no such entry.

    It may be invalid: the checksum shows that the header did not change, not that this package wrote it.
    """
    if name not in metadata:
        return None
    try:
        return json_lines.parsed(metadata[name])
    except ValueError as error:
        raise _refusal(path, f"{name} in its header cannot be read ({error})") from error


def _source(path: str | os.PathLike[str], metadata: dict[str, str]) -> dict[str, str]:
    source = _entry(path, metadata, "source")
    if not isinstance(source, dict):
        raise _refusal(path, f"source in its header: expected strings by name, got {type(source).__name__}")
    return source


def _local(path: str | os.PathLike[str]) -> Path:
    """The path on this machine; raises for an address such as "s3://…", which would become the name of a folder."""
    if is_remote(path):
        raise ProbeError(
            f"{os.fspath(path)}: expected a probe file on this machine, got the address of a remote file. Copy the "
            "file to this machine and give its local path."
        )
    return expanded(path)


def _kind(mode: int) -> str:
    if stat.S_ISDIR(mode):
        return "a folder"
    return "a pipe" if stat.S_ISFIFO(mode) else "a device or a socket"


def _checksum(metadata: dict[str, str]) -> str:
    """Hex SHA-256 over the header's entries without the checksum itself."""
    entries = sorted((key, value) for key, value in metadata.items() if key != _CHECKSUM)
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def _check_header(path: str | os.PathLike[str], metadata: dict[str, str]) -> None:
    """Raise if the header is not complete, or of an unknown format."""
    version = metadata.get("format_version", str(FORMAT_VERSION))
    if version != str(FORMAT_VERSION):
        raise ProbeError(
            f"{path}: expected probe format {FORMAT_VERSION}, got {version}, which a newer ib-callback wrote. Upgrade: "
            "pip install --upgrade ib-callback."
        )
    if metadata.get(_CHECKSUM) != _checksum(metadata):
        raise _refusal(path, "it is not a probe file, or its header was damaged or changed")


def _bytes_of_bool(tensor: Tensor) -> Tensor:
    """The bytes of a mask, because any operation on bool would turn a damaged byte such as 3 into a valid true."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor


def _refusal(path: str | os.PathLike[str], reason: str) -> ProbeError:
    return ProbeError(f"{path}: cannot be loaded as a probe: {reason}. Copy the file again, or make the probe again.")


def _compact(tensor: Tensor) -> Tensor:
    """Halve the size if all numbers fit into 32 bits; loading makes them long again."""
    limits = torch.iinfo(torch.int32)
    fits = limits.min <= int(tensor.min()) and int(tensor.max()) <= limits.max
    return tensor.to(torch.int32) if fits else tensor
