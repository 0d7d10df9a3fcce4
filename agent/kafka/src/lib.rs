//! Kafka for Argo Streams: sources, sinks and an embedded broker, each on its own threads behind bounded queues
