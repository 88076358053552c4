# `just` lists what there is; CI runs the same verbs.

export PATH := justfile_directory() / ".venv/bin" + ":" + env("PATH")

_default:
    @just --list

# everything that must hold before a change is taken
test *arguments:
    ./scripts/test {{ arguments }}

# the checks without the tests
check:
    ruff check .
    ruff format --check .
    mypy
    lint-imports
    python -m schemas.asyncapi --check

# format, and mend what can be mended
fix:
    ruff check --fix .
    ruff format .

# run the system until Ctrl-C
up *arguments:
    concord up {{ arguments }}

# one look at the whole system
demo *arguments:
    ./scripts/demo {{ arguments }}

# write the AsyncAPI description anew from the models
asyncapi:
    python -m schemas.asyncapi

# pin the newest versions that pyproject.toml allows
lock:
    uv pip compile --universal --python-version 3.11 --generate-hashes --custom-compile-command "just lock" \
      --upgrade -o requirements.txt pyproject.toml
    uv pip compile --universal --python-version 3.11 --generate-hashes --custom-compile-command "just lock" \
      --extra dev -c requirements.txt -o requirements-dev.txt pyproject.toml
