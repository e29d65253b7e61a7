# docker build -t mtp_jax .
# docker build -t mtp_jax --build-arg ACCEL=cuda12 .    (or cuda13, tpu)
FROM python:3.12-slim
ARG ACCEL=cpu
COPY . /opt/mtp_jax
RUN pip install --no-cache-dir "/opt/mtp_jax$(test "$ACCEL" = cpu || echo "[$ACCEL]")"
WORKDIR /work
CMD ["mtp-jax", "--help"]
