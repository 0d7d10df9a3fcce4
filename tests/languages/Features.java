import argostreams.Emit;
import argostreams.Stage;
import argostreams.StageException;
import java.io.IOException;
import java.lang.foreign.MemorySegment;
import java.lang.foreign.ValueLayout;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.HashSet;

/** What conform does not try: attributes, several inputs, an interrupted wait, bytes that are kept too long. tests/languages.rs runs it. */
public final class Features {
    private static byte[] bytes(String text) {
        return text.getBytes(StandardCharsets.UTF_8);
    }

    private static String text(byte[] bytes) {
        return new String(bytes, StandardCharsets.UTF_8);
    }

    private static void one(Stage stage, Path file) throws IOException, InterruptedException {
        var thread = new Thread(stage::interrupt);
        thread.start();
        var records = stage.iterator();
        try {
            records.hasNext();
        } catch (StageException failure) {
            if (!failure.isInterrupted()) throw failure;
            Files.write(file, new byte[0]);
        }
        thread.join();
        var how = Emit.DEFAULT.key(bytes("k")).eventTimeNs(5).attribute("hop", bytes("one")).attribute("empty", new byte[0]);
        var inputs = new HashSet<Integer>();
        MemorySegment kept = null;
        Stage.Record first = null;
        int refused = 0;
        for (var record : stage) {
            inputs.add(record.input());
            if (kept == null) {
                kept = record.payload();
                first = record;
            } else {
                try {
                    kept.get(ValueLayout.JAVA_BYTE, 0);
                } catch (IllegalStateException finished) {
                    refused++;
                }
                try {
                    first.key();
                } catch (IllegalStateException finished) {
                    refused++;
                }
                try {
                    stage.emit(kept);
                } catch (IllegalStateException finished) {
                    refused++;
                }
            }
            stage.emit(record.payload(), how);
        }
        stage.emit(bytes("inputs " + inputs.size() + " kept " + (refused == 6 ? "refused" : refused)), how);
    }

    private static void other(Stage stage) {
        for (var record : stage) {
            byte[] empty = record.attribute("empty");
            String line = text(record.attribute("hop")) + " " + (empty != null && empty.length == 0) + " " + (record.attribute("missing") == null)
                    + " " + text(record.key().toArray(ValueLayout.JAVA_BYTE)) + " " + record.eventTimeNs() + " " + text(record.bytes());
            stage.emit(bytes(line));
        }
    }

    private static void fails(Stage stage) {
        for (var record : stage) {
            if (record.attempts() < Integer.parseInt(text(record.bytes()).split(" ")[0])) stage.fail("not today");
            else stage.emit(record.payload());
        }
    }

    public static void main(String[] arguments) throws Exception {
        try (var stage = Stage.open()) {
            if (stage.name().equals("one")) one(stage, Path.of(arguments[0]));
            else if (stage.name().equals("fails")) fails(stage);
            else other(stage);
            stage.finish();
        }
    }
}
