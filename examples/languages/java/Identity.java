import argostreams.Stage;

/** The identity over shared memory: argo-streams conform --transport shm -- java --enable-native-access=ALL-UNNAMED -cp ... Identity */
public final class Identity {
    public static void main(String[] arguments) {
        try (var stage = Stage.open()) {
            for (var record : stage) stage.emit(record.payload());
            stage.finish();
        }
    }
}
