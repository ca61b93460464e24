# compressknow on a CPU, with GGUF files:
#
#   docker build -t compressknow .
#   docker run --rm -v "$PWD:/work" compressknow convert MODEL OUT --quantize int8
#
# Models of the Hub and answers stay in /work/.cache, so that the next run has them.

FROM python:3.12-slim AS build
RUN python3 -m venv /opt/compressknow
# The build for CPUs: the default one brings 3 GB of CUDA.
RUN /opt/compressknow/bin/pip install --no-cache-dir torch --index-url https://download.pytorch.org/whl/cpu
COPY . /src
RUN /opt/compressknow/bin/pip install --no-cache-dir '/src[gguf]'

FROM python:3.12-slim
COPY --from=build /opt/compressknow /opt/compressknow
ENV PATH="/opt/compressknow/bin:$PATH" XDG_CACHE_HOME=/work/.cache HF_HOME=/work/.cache/huggingface
WORKDIR /work
ENTRYPOINT ["compressknow"]
CMD ["--help"]
