#!/usr/bin/env bash
# Installs Debian's or Ubuntu's Chromium where no Chromium or Chrome is, for tests/browser. Elsewhere, and without root,
# it says what to do and succeeds: the tests then say that they were skipped, or fail where CI is set.
set -euo pipefail

for name in chromium chromium-browser google-chrome google-chrome-stable; do
    if command -v "$name" >/dev/null; then
        exit 0
    fi
done

if ! command -v apt-get >/dev/null || [ "$(id -u)" -ne 0 ]; then
    echo "No Chromium found: install it with your package manager to run the browser tests." >&2
    exit 0
fi
echo "Installing Chromium for the browser tests."
export DEBIAN_FRONTEND=noninteractive
# Without a font the browser draws no text.
apt-get -o Acquire::Retries=3 update -qq
apt-get -o Acquire::Retries=3 install -y -qq --no-install-recommends chromium fonts-liberation >/dev/null
