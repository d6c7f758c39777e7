# `mini` behind OpenAI's API, on CPUs.
#
#   docker build --tag mmllm --build-arg TORCH_INDEX=ADDRESS .
#   docker run --rm --publish 127.0.0.1:8000:8000 --env MMLLM_TOKEN=secret mmllm
#
# TORCH_INDEX is the package index of PyTorch's CPU builds, which pytorch.org names; they save the 4 GB
# of CUDA libraries that the usual builds bring. Left out, the usual builds are installed.
# Another model: `docker run … --volume FOLDER:/model:ro mmllm serve /model --host 0.0.0.0`.
FROM python:3.11-slim AS build
ARG TORCH_INDEX=""
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PATH=/opt/venv/bin:$PATH
WORKDIR /src
RUN python -m venv /opt/venv

# Packages first: a change of the code alone does not install them again.
COPY pyproject.toml requirements.lock ./
RUN python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
print(*project['dependencies'], *project['optional-dependencies']['server'], 'hatchling', sep='\n')" \
    > wanted.txt \
    && sed --quiet --regexp-extended 's/^([a-z0-9.-]+)(\[.*\])?(==[^\\]*).*/\1\3/p' requirements.lock \
    > versions.txt \
    && if [ -n "$TORCH_INDEX" ]; then \
    grep --extended-regexp '^torch(audio|vision)?==' wanted.txt > torch.txt \
    && python -m pip install --index-url "$TORCH_INDEX" --requirement torch.txt; fi \
    && python -m pip install --constraint versions.txt --requirement wanted.txt

COPY README.md LICENSE NOTICE ./
COPY tools/package_readme.py tools/
COPY configs configs
COPY mmllm mmllm
# The weights that `mini` is made of are fetched now, so that the container needs no network.
RUN python -m pip install --no-deps --no-build-isolation . \
    && python -m pip uninstall --yes hatchling \
    && MMLLM_CACHE=/opt/mmllm mmllm assets fetch

FROM python:3.11-slim
COPY --from=build /opt/venv /opt/venv
COPY --from=build /opt/mmllm /opt/mmllm
RUN useradd --create-home --uid 1000 mmllm
USER 1000
WORKDIR /home/mmllm
ENV PATH=/opt/venv/bin:$PATH MMLLM_CACHE=/opt/mmllm MMLLM_OFFLINE=1 HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
EXPOSE 8000
HEALTHCHECK --start-period=60s --interval=30s --timeout=5s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["mmllm"]
CMD ["serve", "mini", "--host", "0.0.0.0"]
