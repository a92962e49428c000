"""Stores of files on this machine: servers that speak as S3, HTTP and Hugging Face do."""

import contextlib
import functools
import http.server
import importlib.util
import json
import re
import threading
from pathlib import Path
from urllib.parse import unquote, urlsplit

import fsspec
import pytest
import s3fs
from moto.server import ThreadedMotoServer


@contextlib.contextmanager
def s3():
    """Serve what speaks as S3 does, with a bucket, and yield its files."""
    store = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    store.start()
    host, port = store.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "any",
            "AWS_SECRET_ACCESS_KEY": "any",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_MAX_ATTEMPTS": "1",
        }.items():
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        files = s3fs.S3FileSystem()
        files.mkdir("bucket")
        try:
            yield files
        finally:
            files.rm("bucket", recursive=True)  # stores of one process are one
            store.stop()
            s3fs.S3FileSystem.clear_instance_cache()


HAS_GS = all(map(importlib.util.find_spec, ("gcsfs", "gcp_storage_emulator")))
"""Whether there is what reads `gs://`, and a server for it; neither is among our packages."""


@contextlib.contextmanager
def gs():
    """Serve what speaks as Google's store does, with a bucket, and yield its files."""
    made = importlib.import_module("gcp_storage_emulator.server")
    server = made.create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        port = server._api._httpd.server_port
        patch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
        patch.setenv("FSSPEC_GS_TOKEN", "anon")
        patch.setitem(fsspec.config.conf, "gs", {"token": "anon"})
        try:
            yield fsspec.filesystem("gs", skip_instance_cache=True)
        finally:
            server.stop()


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves the files of a folder; fails, or reads ranges, as it is asked."""

    def __init__(self, *given, asked, **more):
        self.asked = asked
        super().__init__(*given, **more)

    def do_HEAD(self):
        """Tell of a file."""
        if self.asked["refuses"]:
            self.send_error(self.asked["refuses"])
        else:
            super().do_HEAD()

    def do_GET(self):
        """Send a file, or a range of it."""
        if self.asked["refuses"]:
            self.send_error(self.asked["refuses"])
            return
        path = Path(self.translate_path(unquote(urlsplit(self.path).path)))
        if self.asked["failures"]:
            self.send_error(self.asked["failures"].pop())
            return
        if not path.is_file():
            super().do_GET()
            return
        content, length = path.read_bytes(), path.stat().st_size
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if found and self.asked["ranges"]:
            first, last = int(found[1]), min(int(found[2]), length - 1)
            self.asked["served"].append((first, last))
            content = content[first : last + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{length}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Last-Modified", self.date_time_string(path.stat().st_mtime))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        """Say nothing."""


class OfHuggingFace(Handler):
    """Answers as Hugging Face does about a data set `me/data`, whose files are in `RESOLVED`."""

    def do_GET(self):
        """Send a file of the data set, or what there is."""
        path = unquote(urlsplit(self.path).path)
        if not path.startswith("/api/"):
            super().do_GET()
            return
        _, _, _, *name = path.split("/")
        if name[:2] != ["me", "data"]:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            told = {"error": "Repository not found"}
        elif "tree" in name:
            self.send_response(200)
            base = Path(self.directory, RESOLVED)
            below = base / "/".join(name[name.index("main") + 1 :])
            told = [
                {
                    "type": "directory" if x.is_dir() else "file",
                    "path": str(x.relative_to(base)),
                    "size": x.stat().st_size,
                    "oid": f"{hash(x.read_bytes()):x}" if x.is_file() else "0",
                }
                for x in below.glob("**/*" if "recursive=true" in self.path.lower() else "*")
            ]
        else:
            self.send_response(200)
            told = {"id": "me/data", "sha": "0", "private": False, "tags": [], "downloads": 0}
            told |= {"siblings": [], "gated": False, "disabled": False, "likes": 0}
        content = json.dumps(told).encode()
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


RESOLVED = "datasets/me/data/resolve/main"


@contextlib.contextmanager
def served(folder, handler=Handler):
    """Serve files over HTTP; yield the address, and what is asked of the server."""
    asked = {"failures": [], "ranges": True, "served": [], "refuses": 0}
    handler = functools.partial(handler, directory=str(folder), asked=asked)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()
            thread.join()
