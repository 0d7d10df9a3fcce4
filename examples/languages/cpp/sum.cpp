// A sum for each key, kept in the stage's keyed state: 'apple 3' for the key 'apple' adds 3 to it. The sums are written at the end.
#include <argo_streams.hpp>
#include <charconv>
#include <cstdio>

int main()
try {
    ags::Stage stage;
    for (const ags::Record &record : stage) {
        const std::string_view line = record.payload();
        const std::string_view word = line.substr(line.find_last_of(' ') + 1);
        long long amount = 0, total = 0;
        const auto [end, error] = std::from_chars(word.data(), word.data() + word.size(), amount);
        if (error != std::errc() || end != word.data() + word.size()) {
            stage.reject("the last word is not a whole number");
            continue;
        }
        if (const auto value = stage.get(record.key()))
            std::from_chars(value->data(), value->data() + value->size(), total);
        stage.put(record.key(), std::to_string(total + amount));
    }
    stage.items([&](std::string_view key, std::string_view total) { stage.emit(std::string(key) + ' ' + std::string(total)); });
    stage.close();
} catch (const ags::Error &error) {
    std::fprintf(stderr, "sum: %s\n", error.what());
    return 1;
}
