"""As much of an API server as kubectl needs to apply, compare and delete: a double for tests.

It answers discovery, says in its OpenAPI that it validates fields, holds objects in a dictionary,
and refuses what the schemas of Kubernetes do not know. It merges patches of maps, and nothing runs.
"""

import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, urlsplit

import kubernetes_validate

Object = dict[str, Any]

VERSION = "1.34"
_KINDS = {
    "v1": {
        "namespaces": "Namespace", "configmaps": "ConfigMap", "secrets": "Secret",
        "serviceaccounts": "ServiceAccount", "services": "Service",
    },
    "batch/v1": {"jobs": "Job"},
    "apps/v1": {"deployments": "Deployment"},
    "policy/v1": {"poddisruptionbudgets": "PodDisruptionBudget"},
    "networking.k8s.io/v1": {"networkpolicies": "NetworkPolicy"},
}  # fmt: skip


class ApiServer(ThreadingHTTPServer):
    """Holds the objects by their path."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, Object] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


def _base(version: str) -> str:
    return "/api/v1" if version == "v1" else f"/apis/{version}"


def _discovery() -> dict[str, Object]:
    """What a client learns about this server, by the path it asks for."""
    number = {"major": "1", "minor": VERSION[2:], "gitVersion": f"v{VERSION}.0"}
    return {
        "/version": number,
        "/api": {"kind": "APIVersions", "versions": ["v1"]},
        "/apis": {"kind": "APIGroupList", "apiVersion": "v1", "groups": _groups()},
        "/openapi/v3": {"paths": {_base(each)[1:]: _schema_url(each) for each in _KINDS}},
        **{_base(each): _resources(each) for each in _KINDS},
        **{f"/openapi/v3{_base(each)}": _openapi(each) for each in _KINDS},
    }


def _schema_url(version: str) -> Object:
    return {"serverRelativeURL": f"/openapi/v3{_base(version)}?hash=1"}


def _groups() -> list[Object]:
    versions = [each for each in _KINDS if "/" in each]
    named = [{"groupVersion": each, "version": each.split("/")[1]} for each in versions]
    return [
        {"name": each["groupVersion"].split("/")[0], "versions": [each], "preferredVersion": each}
        for each in named
    ]


def _resources(version: str) -> Object:
    verbs = ["create", "delete", "get", "list", "patch", "update", "watch"]
    resources = [
        {
            "name": name, "singularName": kind.lower(), "kind": kind, "verbs": verbs,
            "namespaced": kind != "Namespace",
        }
        for name, kind in _KINDS[version].items()
    ]  # fmt: skip
    return {"kind": "APIResourceList", "groupVersion": version, "resources": resources}


def _openapi(version: str) -> Object:
    """That patches of all kinds take `fieldValidation` and `dryRun`; kubectl asks for no more."""
    group, _, number = version.rpartition("/")
    query = [
        {"name": name, "in": "query", "schema": {"type": "string"}}
        for name in ("fieldValidation", "dryRun")
    ]
    paths = {}
    for name, kind in _KINDS[version].items():
        patch = {
            "parameters": query,
            "responses": {"200": {"description": "OK"}},
            "x-kubernetes-action": "patch",
            "x-kubernetes-group-version-kind": {"group": group, "kind": kind, "version": number},
        }
        paths[f"{_base(version)}/namespaces/{{namespace}}/{name}/{{name}}"] = {"patch": patch}
    return {"openapi": "3.0.0", "info": {"title": "double", "version": VERSION}, "paths": paths}


class _Handler(BaseHTTPRequestHandler):
    server: ApiServer

    def log_message(self, *_: object) -> None:
        """Stay silent."""

    def do_GET(self) -> None:
        path = urlsplit(self.path).path.rstrip("/")
        found = _discovery().get(path) or self.server.objects.get(path)
        if found is None:
            self._refuse(404, "NotFound", f"{path} is not there")
        else:
            self._answer(200, found)

    def do_POST(self) -> None:
        given = self._body()
        given["metadata"].setdefault("uid", str(uuid.uuid4()))
        given["metadata"]["resourceVersion"] = "1"
        self._keep(f"{urlsplit(self.path).path}/{given['metadata']['name']}", given, 201)

    def do_PATCH(self) -> None:
        path = urlsplit(self.path).path
        if path in self.server.objects:
            self._keep(path, _merged(self.server.objects[path], self._body()), 200)
        else:
            self._refuse(404, "NotFound", f"{path} is not there")

    def do_DELETE(self) -> None:
        self._body()
        path = urlsplit(self.path).path
        if self.server.objects.pop(path, None):
            self._answer(200, {"kind": "Status", "apiVersion": "v1", "status": "Success"})
        else:
            self._refuse(404, "NotFound", f"{path} is not there")

    def _keep(self, path: str, content: Object, code: int) -> None:
        try:
            kubernetes_validate.validate(content, VERSION, strict=True)
        except kubernetes_validate.ValidationError as error:
            self._refuse(422, "Invalid", f"{content['kind']}: {error.message}")
            return
        if "All" not in parse_qs(urlsplit(self.path).query).get("dryRun", []):
            self.server.objects[path] = content
        self._answer(code, content)

    def _body(self) -> Any:
        return json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "{}")

    def _refuse(self, code: int, reason: str, message: str) -> None:
        status = {"kind": "Status", "apiVersion": "v1", "status": "Failure"}
        self._answer(code, status | {"reason": reason, "code": code, "message": message})

    def _answer(self, code: int, content: Object) -> None:
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _merged(old: Any, patch: Any) -> Any:
    """Merge maps as RFC 7396 has it, and with the one directive that kubectl sends here."""
    if not isinstance(patch, dict):
        return patch
    is_whole = patch.pop("$patch", "") == "replace"
    base = dict(old) if isinstance(old, dict) and not is_whole else {}
    for name, value in patch.items():
        base[name] = _merged(base.get(name), value)
    return {name: value for name, value in base.items() if value is not None}


@contextmanager
def api_server() -> Iterator[ApiServer]:
    """Serve for a while."""
    with ApiServer() as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
