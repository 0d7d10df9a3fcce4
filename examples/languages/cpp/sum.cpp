// A sum for each key, kept in the stage's keyed state: {"key":"apple","n":3} adds 3 to that of its key. The sums are written at the
// end. It looks for "n": in the text; a program with more to read takes a JSON library.
#include <argo_streams.hpp>
#include <charconv>
#include <cstdio>

int main()
try {
    ags::Stage stage;
    for (const ags::Record &record : stage) {
        const std::string_view line = record.payload();
        constexpr std::string_view name = "\"n\":";
        const std::size_t at = line.find(name);
        const std::string_view number = at == line.npos ? std::string_view() : line.substr(at + name.size());
        long long amount = 0, total = 0;
        if (std::from_chars(number.data(), number.data() + number.size(), amount).ec != std::errc()) {
            stage.reject("there is no whole number n in it");
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
