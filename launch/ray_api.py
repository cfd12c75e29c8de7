"""Speaking to a running Ray cluster: its jobs API answers questions over HTTP, `ray job` does the rest. Imports no Ray.

**Token.** A cluster that was started with one demands it of everybody: of us, who look for it where Ray does, and of
the job, whose nodes have their own. It is never part of the job, which the dashboard shows.
"""

import http.client
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from launch.site import Site
from nulsq.errors import InputError, missing

SECONDS = 20  # for an answer
TRIES = 5  # where the connection is lost


def ray() -> str:
    """The script of that name. Raises InputError where Ray is not installed."""
    found = shutil.which("ray", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if found is None:
        raise missing("ray", "search")
    return found


def common(site: Site) -> list[str]:
    """Options of every `ray job` command."""
    return ["--address", site.address, "--log-style=pretty", "--log-color=false"]


def token(site: Site) -> tuple[str | None, str]:
    """The token, if any, and in words where it is from: looked for where Ray looks.

    Raises InputError for a file that was named and holds none.
    """
    if site.token is None and os.environ.get("RAY_AUTH_MODE") == "disabled":
        return None, "without a token (RAY_AUTH_MODE=disabled)"
    if site.token is None and os.environ.get("RAY_AUTH_TOKEN"):
        return os.environ["RAY_AUTH_TOKEN"].strip(), "with the token in RAY_AUTH_TOKEN"
    named = site.token or os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named or "~/.ray/auth_token").expanduser()
    try:
        (secret,) = path.read_text().split()
    except (OSError, ValueError) as error:
        if named is None and not path.exists():
            return None, "without a token (none in the site's `token`, RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or " \
                         "~/.ray/auth_token)"
        raise InputError(f"token = {path}: " + (f"cannot be read ({error.strerror})" if isinstance(error, OSError) else
                                                "holds no token, which is one word")) from None
    return secret, f"with the token in {path}"


def environment(site: Site) -> dict[str, str]:
    """Of a `ray job` command. What is uploaded is what is in the snapshot, whatever its .gitignore says."""
    secret, _ = token(site)
    own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secret} if secret else {"RAY_AUTH_MODE": "disabled"}
    return os.environ | own | {"PYTHONUNBUFFERED": "1", "RAY_RUNTIME_ENV_IGNORE_GITIGNORE": "1"}


def ask(site: Site, path: str) -> dict[str, Any]:
    """What the jobs API answers, {} where it has nothing like it. Raises InputError where it does not answer us."""
    secret, whose = token(site)
    asked = urllib.request.Request(site.address.rstrip("/") + path,
                                   headers={"Authorization": f"Bearer {secret}"} if secret else {})
    try:
        with urllib.request.urlopen(asked, timeout=SECONDS) as answer:
            found = json.load(answer)
            return found if isinstance(found, dict) else {}
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            raise InputError(f"address = {site.address}: {'the wrong token' if secret else 'it demands a token'} "
                             f"({error.code}); asked {whose}. Copy the cluster's token (on its head: "
                             "~/.ray/auth_token, or what RAY_AUTH_TOKEN_PATH names there) and name the file in the "
                             "site's `token`") from None
        if error.code >= 500:
            raise InputError(f"address = {site.address}: its jobs API fails ({error})") from None
        return {}
    except (ValueError, http.client.BadStatusLine):
        return {}
    except OSError as error:
        raise InputError(f"address = {site.address}: no jobs API answers there ({getattr(error, 'reason', error)}). It "
                         "is part of the dashboard: pip install \"ray[default]\" on the head, ray start --head "
                         "--include-dashboard=true; from elsewhere ssh -L 8265:127.0.0.1:8265 HEAD") from None


def check(site: Site) -> None:
    """Raises InputError where no jobs API answers, or not with the token that there is."""
    if "ray_version" not in ask(site, "/api/version"):
        raise InputError(f"address = {site.address}: something answers there, but not the jobs API of a Ray cluster")


def tell(words: list[str], site: Site) -> None:
    """Run a `ray job` command. Raises InputError, with its words, where it fails."""
    done = subprocess.run(words, env=environment(site), capture_output=True, text=True)
    if done.returncode:
        said = (re.findall(r"^[\w.]+(?:Error|Exception): .*", done.stderr, re.MULTILINE) or [done.stderr])[-1]
        hint = " (two Rays on the head's machine want the same port; ray start --dashboard-agent-listen-port=N there " \
               "gives it another one)" if "No available agent" in said else ""
        raise InputError(f"ray job {words[2]}: {' '.join(said.split())[:400]}{hint}")
