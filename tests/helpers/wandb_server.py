"""A loopback server for the W&B client: enough of its interface to upload, sync and resume runs,
and to save, find and load reports.

Rows are stored by line number, as the real server does: `history[offset + i]`. So a client that
sends a row twice shows up here as two lines.
"""

from __future__ import annotations

import base64
import gzip
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class ServerRun:
    name: str
    group: str = ""
    job_type: str = ""
    display_name: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    history: dict[int, dict[str, Any]] = field(default_factory=dict)  # line number -> row
    exit_code: int | None = None

    @property
    def steps(self) -> list[int]:
        return [self.history[line]["_step"] for line in sorted(self.history)]


class WandbServer:
    """`with WandbServer() as server`: `server.url`, `server.runs` and `server.reports` by id."""

    def __init__(self) -> None:
        self.runs: dict[str, ServerRun] = {}
        self.projects: set[str] = set()  # ENTITY/PROJECT, which reports may be saved in
        self.reports: dict[str, dict[str, Any]] = {}
        self.operations: list[str] = []
        self.denied = ""  # an error that each report is answered with
        self.begun: dict[str, Any] = {}
        self.artifacts: list[dict[str, Any]] = []
        self.busy = 0  # so many of the next uploads of rows are answered 429
        self.away = False  # nobody is answered
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: Any) -> None:
                pass

            def body(self) -> bytes:
                if "chunked" in self.headers.get("Transfer-Encoding", ""):
                    data = b""
                    while size := int(self.rfile.readline().split(b";")[0], 16):
                        data += self.rfile.read(size)
                        self.rfile.readline()
                    self.rfile.readline()
                else:
                    data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                return gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data

            def answer(self) -> None:
                data, status = self.body(), 200
                if server.away:
                    self.close_connection = True
                    return
                if self.path.startswith("/graphql"):
                    reply = server.graphql(json.loads(data))
                elif match := re.fullmatch(r"/files/[^/]*/[^/]*/([^/]+)/file_stream", self.path):
                    if server.busy:
                        server.busy, status, reply = server.busy - 1, 429, {"error": "rate limit"}
                    else:
                        reply = server.file_stream(match[1], json.loads(data or b"{}"))
                else:
                    reply = {}
                content = json.dumps(reply).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = do_PUT = do_HEAD = answer

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # a client that was killed

        self.http = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"

    def __enter__(self) -> WandbServer:
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.http.shutdown()
        self.http.server_close()

    def graphql(self, request: dict[str, Any]) -> dict[str, Any]:
        match = re.search(r"(?:query|mutation)\s+(\w+)", request["query"])
        operation = match[1] if match else ""
        variables = request.get("variables") or {}
        self.operations.append(operation)
        if operation == "UpsertBucket":
            run = self.runs.setdefault(variables["name"], ServerRun(variables["name"]))
            run.group = variables.get("groupName") or run.group
            run.job_type = variables.get("jobType") or run.job_type
            run.display_name = variables.get("displayName") or run.display_name
            run.config |= json.loads(variables.get("config") or "{}")
            run.summary |= json.loads(variables.get("summaryMetrics") or "{}")
            bucket = {"id": "x", "name": run.name, "displayName": run.display_name, "config": "{}"}
            bucket |= {"sweepName": None, "historyLineCount": len(run.history)}
            bucket["project"] = {"id": "p", "name": "p", "entity": {"id": "e", "name": "ent"}}
            return {"data": {"upsertBucket": {"bucket": bucket, "inserted": not run.history}}}
        if operation == "RunResumeStatus":
            resumed = self.runs.get(variables["name"])
            bucket = None if resumed is None else self.resume_status(resumed)
            entity = {"id": "e", "name": "ent"}
            return {"data": {"model": {"id": "p", "name": "p", "entity": entity, "bucket": bucket}}}
        if operation == "CreateRunFiles":
            files = [
                {"name": name, "uploadUrl": f"{self.url}/upload"} for name in variables["files"]
            ]
            created = {"runID": "x", "uploadHeaders": [], "files": files}
            return {"data": {"createRunFiles": created}}
        if operation == "Viewer":
            viewer = {"id": "u", "entity": "ent", "username": "u", "flags": "{}", "teams": None}
            return {"data": {"viewer": viewer}}
        if operation.startswith(("Artifact", "CreateArtifact", "CommitArtifact")):
            return {"data": self.artifact(operation, variables)}
        if operation == "upsertView" and self.denied:
            return {"errors": [{"message": self.denied, "path": ["upsertView"]}], "data": None}
        answer = self.about_reports(operation, variables)
        return {"data": answer or {}}

    def about_reports(self, operation: str, given: dict[str, Any]) -> dict[str, Any] | None:
        end = {"__typename": "PageInfo", "endCursor": None, "hasNextPage": False}
        project = given.get("project") or given.get("projectName")
        place = f"{given.get('entity') or given.get('entityName')}/{project}"
        if operation == "GetDefaultEntity":
            return {"viewer": {"id": "u", "entity": "ent"}}
        if operation == "GetProjects":
            names = [each.split("/") for each in self.projects if each.startswith(place[:-4])]
            found = [
                {"__typename": "Project", "id": name, "name": name, "entityName": entity,
                 "createdAt": "2026-01-01T00:00:00Z", "isBenchmark": False, "user": None}
                for entity, name in names
            ]  # fmt: skip
            return {"models": {"pageInfo": end, "edges": [{"node": node} for node in found]}}
        if operation == "ProjectInternalId":
            known = {"id": place, "internalId": place} if place in self.projects else None
            return {"project": known}
        if operation == "Runs":
            wanted = json.loads(given["filters"])
            groups, job = wanted["group"]["$in"], wanted["jobType"]
            num = sum(run.group in groups and run.job_type == job for run in self.runs.values())
            found = {"internalId": place, "runCount": num, "runs": {"edges": [], "pageInfo": end}}
            return {"project": found if place in self.projects else None}
        if operation == "ProjectViews":
            edges = [
                {"node": view, "cursor": view["id"]}
                for view in self.reports.values()
                if f"{view['project']['entityName']}/{view['project']['name']}" == place
            ]
            views = {"allViews": {"edges": edges, "pageInfo": end}}
            return {"project": views if place in self.projects else None}
        if operation == "SpecificReport":
            return {"view": self.reports.get(given["reportId"])}
        if operation == "upsertView":
            number = base64.b64encode(b"View:%d" % len(self.reports)).decode().rstrip("=")
            view = self.reports.setdefault(given["id"] or number, {"id": number})
            view |= {key: given[key] for key in ("name", "displayName", "description", "spec")}
            owner = {"id": place, "name": project, "entityName": given["entityName"]}
            view |= {"type": given["type"], "project": owner, "user": None}
            view |= {"createdAt": "2026-01-01T00:00:00Z", "updatedAt": "2026-01-01T00:00:00Z"}
            return {"upsertView": {"view": view, "inserted": given["id"] is None}}
        return None

    def artifact(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        """What logging one artifact asks; `artifacts` has those that were committed."""
        begun, to = self.begun, {"uploadUrl": f"{self.url}/upload", "uploadHeaders": []}
        if operation == "ArtifactType":
            return {"project": None}
        if operation == "CreateArtifact":
            begun |= variables["input"]
            sequence = {"id": "s", "latestArtifact": None}
            artifact = {"id": "a", "state": "PENDING", "artifactSequence": sequence}
            return {"createArtifact": {"artifact": artifact}}
        if operation == "CreateArtifactManifest":
            manifest = {"id": "m", "file": to | {"id": "f", "name": "m", "displayName": "m"}}
            return {"createArtifactManifest": {"artifactManifest": manifest}}
        if operation == "CreateArtifactFiles":
            begun["files"] = [file["name"] for file in variables["input"]["artifactFiles"]]
            node = to | {"storagePath": "x", "uploadMultipartUrls": None, "artifact": {"id": "a"}}
            edges = [{"node": node} for _ in begun["files"]]
            return {"createArtifactFiles": {"files": {"edges": edges}}}
        if operation == "CommitArtifact":
            self.artifacts.append(begun)
            return {"commitArtifact": {"artifact": {"id": "a", "digest": "d"}}}
        collection = {"name": begun["artifactCollectionName"], "__typename": "ArtifactSequence"}
        collection["project"] = {"id": "p", "internalId": "1", "name": "p", "entity": {"name": "e"}}
        known = {"id": "a", "artifactSequence": collection, "artifactType": {"name": "model"}}
        known |= {"__typename": "Artifact", "versionIndex": 0, "state": "COMMITTED", "tags": []}
        known |= {"size": 1, "digest": "d", "fileCount": 1, "aliases": [], "ttlIsInherited": False}
        known |= dict.fromkeys(("description", "metadata", "historyStep", "commitHash"))
        known |= {"createdAt": "2026-01-01T00:00:00", "updatedAt": None, "ttlDurationSeconds": -1}
        return {"artifact": known}

    @staticmethod
    def resume_status(run: ServerRun) -> dict[str, Any]:
        lines = [json.dumps(run.history[i]) for i in sorted(run.history)]
        return {
            "id": "x",
            "name": run.name,
            "summaryMetrics": json.dumps(run.summary),
            "displayName": run.display_name,
            "logLineCount": 0,
            "historyLineCount": len(lines),
            "eventsLineCount": 0,
            "historyTail": json.dumps(lines[-1:]),
            "eventsTail": "[]",
            "config": json.dumps(run.config),
            "tags": [],
            "wandbConfig": '{"t": 1}',  # the client takes a run without "t" as never started
        }

    def file_stream(self, name: str, request: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.setdefault(name, ServerRun(name))
        files = request.get("files") or {}
        if chunk := files.get("wandb-history.jsonl"):
            for i, line in enumerate(chunk["content"]):
                run.history[chunk["offset"] + i] = json.loads(line)
        if chunk := files.get("wandb-summary.json"):
            run.summary |= json.loads(chunk["content"][-1])
        if request.get("complete"):
            run.exit_code = request.get("exitcode")
        return {}
