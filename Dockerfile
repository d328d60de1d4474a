# nestord and nestor for CPUs, on Debian 12.
#
#   docker build -t nestor:0.1.0 .
#   docker run --rm -p 50051:50051 -p 9464:9464 -v "$PWD/models:/models:ro" nestor:0.1.0
#
# The configuration in the image is deploy/kubernetes/nestord.yaml; mount another over
# /etc/nestor/nestord.yaml to replace it.

FROM debian:12-slim AS build
WORKDIR /src
# Its own layer: a changed source file does not install the packages again.
COPY scripts/install_packages.sh scripts/
RUN scripts/install_packages.sh && rm -rf /var/lib/apt/lists/*
COPY . .
RUN cmake --preset cpu -DNESTOR_BUILD_TESTS=OFF \
    && cmake --build build --target nestord nestor \
    && strip build/bin/nestord build/bin/nestor

FROM debian:12-slim
# What `readelf -d` names in the two programs, by Debian's package names; tests/deploy compares.
RUN apt-get update \
    && apt-get install -y --no-install-recommends \
        libabsl20220623 \
        libgcc-s1 \
        libgrpc++1.51 \
        libgrpc29 \
        libicu72 \
        libopenblas0-pthread \
        libpcre2-8-0 \
        libprometheus-cpp-core1.0 \
        libprometheus-cpp-pull1.0 \
        libprotobuf32 \
        libssl3 \
        libstdc++6 \
        libyaml-cpp0.7 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin nestor
COPY --from=build /src/build/bin/nestord /src/build/bin/nestor /usr/local/bin/
COPY --from=build /src/LICENSE /usr/share/doc/nestor/LICENSE
COPY deploy/kubernetes/nestord.yaml /etc/nestor/nestord.yaml
# The artifact of nestor compress; read only.
VOLUME /models
USER 10001:10001
# gRPC; metrics.
EXPOSE 50051 9464
# nestord drains on SIGTERM.
STOPSIGNAL SIGTERM
ENTRYPOINT ["nestord"]
CMD ["--config", "/etc/nestor/nestord.yaml"]
