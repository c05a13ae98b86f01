# Runs as root inside the box: gpuwatch from the wheels in /root/wheels, and a vLLM stand-in to watch.
set -eu
test -x /opt/gpuwatch/bin/python || python3 -m venv /opt/gpuwatch
/opt/gpuwatch/bin/pip install -q --no-index --find-links /root/wheels --force-reinstall --no-deps /root/wheels/*.whl
systemd-sysusers
id vllm >/dev/null 2>&1 || useradd --system --no-create-home vllm
systemd-tmpfiles --create gpuwatch.conf
systemctl daemon-reload
systemctl -q enable vllm-standin.service
systemctl restart polkit.service
