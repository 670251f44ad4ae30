"""Pipelines from the hub: a filled cache without a network, and another server."""

import contextlib
import fnmatch
import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import pipelines
from fanal.adapters.pipeline_files import _patterns, fetch
from fanal.adapters.pipelines import load_pipeline
from fanal.errors import FanalError

pytest.importorskip("diffusers")

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def hub_cache(root, name, folder):
    """A filled cache as huggingface_hub lays it out: blobs, and a snapshot of links to them."""
    place = root / f"models--{name.replace('/', '--')}"
    snapshot = place / "snapshots" / COMMIT
    (place / "blobs").mkdir(parents=True)
    (place / "refs").mkdir()
    (place / "refs/main").write_text(COMMIT)
    for file in folder.rglob("*"):
        if file.is_file():
            blob = place / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
            shutil.copy(file, blob)
            link = snapshot / file.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))


def test_a_filled_cache_works_offline(tmp_path, monkeypatch):
    import huggingface_hub.constants as constants

    pipe, folder, cache = pipelines.make_ddim(), tmp_path / "folder", tmp_path / "cache"
    pipe.save_pretrained(folder)
    hub_cache(cache, "org/tiny", folder)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    net = load_pipeline("hub:org/tiny")
    x = torch.randn(1, *net.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mine, theirs = (one(x, torch.tensor(1.0, dtype=torch.float64)) for one in (net, load_pipeline(pipe)))
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    assert net.card()["source"] == {"format": "diffusers pipeline", "hub": "org/tiny", "revision": COMMIT}
    assert load_pipeline("hub:org/tiny", revision=COMMIT).fingerprint() == net.fingerprint()
    for name in ("org/other", "org/tiny/more", "tiny", "../tiny", "org/.."):
        with pytest.raises(FanalError, match="cannot fetch hub:|expected hub:ORG/NAME"):
            load_pipeline(f"hub:{name}")


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's protocol as a download needs."""

    folder = Path()
    asked: list[str] = []

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def send(self, data, **headers):
        self.send_response(200)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_GET(self):
        path = self.path.partition("?")[0]
        files = [file for file in self.folder.rglob("*") if file.is_file()]
        if path.startswith("/api/models/org/tiny/tree/"):
            entries = [
                {
                    "type": "file",
                    "path": file.relative_to(self.folder).as_posix(),
                    "size": file.stat().st_size,
                    "oid": hashlib.sha1(file.read_bytes()).hexdigest(),
                }
                for file in files
            ]
            self.send(json.dumps(entries).encode(), Content_Type="application/json")
        elif path.startswith("/api/models/org/tiny"):
            siblings = [{"rfilename": file.relative_to(self.folder).as_posix()} for file in files]
            about = {"id": "org/tiny", "sha": COMMIT, "siblings": siblings}
            self.send(json.dumps(about).encode(), Content_Type="application/json")
        elif path.startswith(f"/org/tiny/resolve/{COMMIT}/"):
            name = path.removeprefix(f"/org/tiny/resolve/{COMMIT}/")
            if self.command == "GET":
                self.asked.append(name)
            data = (self.folder / name).read_bytes()
            etag = hashlib.sha1(data).hexdigest()
            self.send(data, ETag=f'"{etag}"', X_Repo_Commit=COMMIT)
        else:
            self.send_error(404)


@contextlib.contextmanager
def serving(folder):
    handler = type("Served", (Hub,), {"folder": folder, "asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler.asked
    finally:
        server.shutdown()
        server.server_close()


def test_another_server_by_hf_endpoint(tmp_path):
    """Only configurations, tokenizers and safetensors of known components are fetched, and nothing twice.

    They are checked before diffusers or transformers are imported.
    """
    place = tmp_path / "folder"
    pipelines.make_sd().save_pretrained(place)
    (place / "pipeline.py").write_text("raise SystemExit(3)")
    (place / "unet/diffusion_pytorch_model.bin").write_bytes(b"x")
    (place / "unet/diffusion_pytorch_model.fp16.safetensors").write_bytes(b"x")
    (place / "safety_checker").mkdir()
    (place / "safety_checker/model.safetensors").write_bytes(b"x")
    code = (
        "import sys; from fanal.errors import FanalError; from fanal.adapters.pipeline_files import *\n"
        "folder = fetch('org/tiny'); print(read_layout(folder).kind); print(fetch('org/tiny') == folder)\n"
        "print(not {'diffusers', 'transformers'} & set(sys.modules))\n"
        "try: fetch('org/none')\nexcept FanalError as error: print(error)"
    )
    with serving(place) as (address, asked):
        env = os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    lines = done.stdout.splitlines()
    assert lines[:3] == ["StableDiffusionPipeline", "True", "True"], done.stderr
    assert lines[3].startswith("cannot fetch hub:org/none")
    assert len(asked) == len(set(asked))
    assert "unet/diffusion_pytorch_model.safetensors" in asked
    unwanted = [name for name in asked if name.endswith((".py", ".bin", "fp16.safetensors")) or "safety" in name]
    assert unwanted == []


NAMES = [
    "model_index.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.safetensors.index.json",
    "unet/modeling.py",
    "tokenizer/vocab.json",
    "tokenizer/tokenizer.py",
    "v1-5-pruned.ckpt",
    "README.md",
]
ALWAYS = {0, 1, 8, 10}


@pytest.mark.parametrize(
    ("allow_bin", "variant", "more"),
    [(False, None, {2, 3}), (True, None, {2, 3, 7}), (False, "fp16", {4, 5})],
)
def test_what_is_fetched_of_a_repository(allow_bin, variant, more):
    patterns = _patterns(["unet", "tokenizer"], allow_bin, variant)
    chosen = {i for i, name in enumerate(NAMES) if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)}
    assert chosen == ALWAYS | more


def test_offline_without_a_cache_is_told(tmp_path, monkeypatch):
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FanalError, match=r"cannot fetch hub:org/tiny \(HF_HUB_OFFLINE is set\)"):
        fetch("org/tiny")
