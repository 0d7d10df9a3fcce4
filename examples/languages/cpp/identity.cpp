// The identity over shared memory: argo-streams conform --transport shm -- ./identity
#include <argo_streams.hpp>
#include <cstdio>

int main()
try {
    ags::Stage stage;
    for (const ags::Record &record : stage)
        stage.emit(record.payload());
    stage.close();
} catch (const ags::Error &error) {
    std::fprintf(stderr, "identity: %s\n", error.what());
    return 1;
}
