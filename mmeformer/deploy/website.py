# SPDX-License-Identifier: Apache-2.0
"""Static web pages that run an exported ONNX file in the browser."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import tarfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory

from mmeformer import runtime
from mmeformer.errors import UserError
from mmeformer.files import replacing
from mmeformer.images import read_image

PACKAGE, VERSION = "onnxruntime-web", "1.30.0"
SHA256 = "d2228df7e4616bc3348bf504ee888f3bec43789a273f0a63f3e68d203ce3bf71"
"""Of the package's archive: another file under the same name is refused."""

LIBRARY = (
    "ort.wasm.min.mjs",
    "ort-wasm-simd-threaded.mjs",
    "ort-wasm-simd-threaded.wasm",
    "ort.webgpu.min.mjs",
    "ort-wasm-simd-threaded.asyncify.mjs",
    "ort-wasm-simd-threaded.asyncify.wasm",
)
"""Files of the package that the page loads: the first three run on the processor."""


class WebsiteError(UserError, RuntimeError):
    """The page cannot be built."""


def build(
    model: str | Path,
    out: str | Path,
    *,
    example: str | Path | None = None,
    library: str | Path | None = None,
    force: bool = False,
) -> Path:
    """Write a folder that any static host can serve; all paths in it are relative.

    Args:
        model: exported ONNX file.
        out: folder to write.
        example: picture that the page shows first.
        library: folder or archive of onnxruntime-web; None fetches the pinned version with npm.
        force: replace an existing folder.

    Raises:
        FileExistsError: ``out`` exists.
        FileNotFoundError: a file does not exist.
        ValueError: ``model`` is no file that mmeformer exported, or ``example`` no picture.
        WebsiteError: onnxruntime-web cannot be fetched, or lacks files.
    """
    out = Path(out)
    if out.exists() and not force:
        raise FileExistsError(f"{out} exists; use another name, or --force to replace it")
    predictor = runtime.load(model)
    metadata = predictor.metadata
    if "scores0" in {output.name for output in predictor.session.get_outputs()}:
        raise ValueError(
            f"{model} gives boxes before NMS, which the page does not do: export it with "
            "--nms inside"
        )
    page = {**json.loads(metadata.to_json()), "stretches": metadata.export.stretches}
    if example is not None:
        read_image(example)
        page["example"] = "example" + Path(example).suffix.lower()
    with replacing(out) as draft, TemporaryDirectory() as folder:
        draft.mkdir()
        for source in files("mmeformer.deploy").joinpath("web").iterdir():
            (draft / source.name).write_bytes(source.read_bytes())
        package = _unpacked(Path(library) if library else fetch(Path(folder)), Path(folder))
        _copy_library(package, draft)
        shutil.copy(model, draft / "model.onnx")
        if example is not None:
            shutil.copy(example, draft / page["example"])
        (draft / "model.json").write_text(json.dumps(page, indent=1) + "\n", encoding="utf-8")
    return out


def fetch(folder: Path) -> Path:
    """Fetch the archive of the pinned onnxruntime-web with npm.

    Raises:
        WebsiteError: npm is missing or fails, or the archive is not the pinned one.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise WebsiteError(
            f"npm is not installed, which fetches {PACKAGE}: install Node.js, or give a folder of "
            f"{PACKAGE} {VERSION} with --library"
        )
    command = [npm, "pack", f"{PACKAGE}@{VERSION}", "--silent", "--pack-destination", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    archive = folder / f"{PACKAGE}-{VERSION}.tgz"
    if done.returncode or not archive.is_file():
        reason = (done.stderr.strip().splitlines() or ["no archive"])[-1]
        raise WebsiteError(f"npm cannot fetch {PACKAGE} {VERSION}: {reason}")
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != SHA256:
        raise WebsiteError(
            f"{PACKAGE} {VERSION} from npm has the SHA-256 {digest}, but should have {SHA256}"
        )
    return archive


def _unpacked(source: Path, folder: Path) -> Path:
    """Folder of a package: itself, or that of its unpacked archive."""
    if source.is_dir():
        return source
    if not source.is_file():
        raise FileNotFoundError(f"{PACKAGE} {source} does not exist")
    with tarfile.open(source) as archive:
        archive.extractall(folder, filter="data")
    return folder / "package"


def _copy_library(package: Path, site: Path) -> None:
    """Copy what the page loads, and note the licenses."""
    target = site / "ort"
    target.mkdir()
    for name in LIBRARY:
        source = package / "dist" / name
        if not source.is_file():
            raise WebsiteError(f"{package} has no dist/{name}: give {PACKAGE} {VERSION}")
        shutil.copy(source, target / name)
    facts = json.loads((package / "package.json").read_text(encoding="utf-8"))
    home = facts.get("homepage") or facts.get("repository", {}).get("url", "")
    (site / "LICENSES.txt").write_text(
        "This page: mmeformer, Apache License 2.0 (https://www.apache.org/licenses/LICENSE-2.0)\n"
        f"Folder ort/: {facts['name']} {facts['version']}, {facts['license']} License,\n"
        f"Copyright (c) Microsoft Corporation, unchanged ({home})\n",
        encoding="utf-8",
    )


class _Handler(SimpleHTTPRequestHandler):
    """Serves a site with the headers that threads need."""

    extensions_map = {
        **SimpleHTTPRequestHandler.extensions_map,
        ".js": "text/javascript",
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
        ".onnx": "application/octet-stream",
    }

    def end_headers(self) -> None:
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        super().end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Write nothing per request."""


def serve(site: Path, port: int) -> None:
    """Serve a folder to this machine alone, until it is interrupted; port 0 takes a free one."""
    with server(site, port) as running:
        print(f"http://127.0.0.1:{running.server_port}/ (end with Ctrl+C)")
        try:
            running.serve_forever()
        except KeyboardInterrupt:
            print("stopped")


def server(site: Path, port: int = 0) -> ThreadingHTTPServer:
    """A server of a site, for this machine alone; ``serve_forever`` starts it.

    Raises:
        OSError: the port is in use.
    """
    return ThreadingHTTPServer(("127.0.0.1", port), partial(_Handler, directory=str(site)))
