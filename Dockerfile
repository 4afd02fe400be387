# The server and what it needs to run .onnx files: no torch, no compiler, no rights.
#
#     docker build --tag workbench-server .
#     docker run --rm --publish 127.0.0.1:8000:8000 --volume ./models:/models:ro workbench-server
#
# BASE is any Debian with Python 3.11 and pip; give it with its digest to get the same one again.
# deploy/build.sh does the same without a registry of images.
ARG BASE=docker.io/library/python:3.11-slim-bookworm

FROM ${BASE} AS packages
# Both are set where there is no index of packages, but a folder of wheels.
ARG PIP_NO_INDEX
ARG PIP_FIND_LINKS
WORKDIR /build
COPY requirements.lock deploy/serve.txt ./
# The list names what is needed, the lock says in which version; wheels only, so nothing is compiled.
RUN python3 -m pip install --no-cache-dir --no-compile --only-binary=:all: --target=/opt/packages \
    --constraint=requirements.lock --requirement=serve.txt
COPY workbench /opt/app/workbench
# Bytecode is known by its source's hash, not by the time: a quick start, on any day.
RUN python3 -m compileall -q -j 0 --invalidation-mode=unchecked-hash /opt/packages /opt/app

FROM ${BASE}
COPY --from=packages /opt /opt
ENV PYTHONPATH=/opt/app:/opt/packages \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    OMP_NUM_THREADS=1 \
    HOME=/tmp
# A number, so that Kubernetes can see that it is not root.
USER 10001:10001
WORKDIR /tmp
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s --retries=3 \
    CMD ["python3", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/v2/health/ready', timeout=2)"]
ENTRYPOINT ["python3", "-m", "workbench.deploy.server", "--host", "0.0.0.0", "--port", "8000"]
CMD ["--repository", "/models"]
