"""The identity over shared memory: argo-streams conform --transport shm -- python3 identity.py"""
import argo_streams

with argo_streams.open() as stage:
    for record in stage:
        stage.emit(record.payload)
