import argostreams.Stage;
import java.lang.foreign.ValueLayout;
import java.nio.charset.StandardCharsets;
import java.util.regex.Pattern;

/**
 * A sum for each key, kept in the stage's keyed state: {"key": "apple", "n": 3} adds 3 to that of its key. The sums are written at the end.
 * It looks for "n": in the text; a program with more to read takes a JSON library.
 */
public final class Sum {
    private static final Pattern NUMBER = Pattern.compile("\"n\": ?(-?[0-9]{1,18})\\b");

    public static void main(String[] arguments) {
        try (var stage = Stage.open()) {
            for (var record : stage) {
                var found = NUMBER.matcher(new String(record.bytes(), StandardCharsets.UTF_8));
                if (!found.find()) {
                    stage.reject("there is no whole number n in it");
                    continue;
                }
                byte[] key = record.key() == null ? new byte[0] : record.key().toArray(ValueLayout.JAVA_BYTE);
                byte[] before = stage.get(key);
                long total = before == null ? 0 : Long.parseLong(new String(before, StandardCharsets.US_ASCII));
                stage.put(key, Long.toString(total + Long.parseLong(found.group(1))).getBytes(StandardCharsets.US_ASCII));
            }
            for (var item : stage.items()) {
                stage.emit((new String(item.getKey(), StandardCharsets.UTF_8) + " " + new String(item.getValue(), StandardCharsets.US_ASCII)).getBytes(StandardCharsets.UTF_8));
            }
            stage.finish();
        }
    }
}
