// Numbers the records of each key in keyed state: {"key":"k1","n":17} for the record of k1 behind seventeen others. With WHOLE in the
// environment also all records, under a key that is nobody's record's. For tests/ctl.rs.
#include <argo_streams.hpp>
#include <charconv>
#include <cstdio>
#include <cstdlib>

static long long next_number(ags::Stage &stage, std::string_view key)
{
    long long number = 0;
    if (const auto value = stage.get(key))
        std::from_chars(value->data(), value->data() + value->size(), number);
    stage.put(key, std::to_string(number + 1));
    return number;
}

int main()
try {
    const bool counts_all = std::getenv("WHOLE") != nullptr;
    ags::Stage stage;
    for (const ags::Record &record : stage) {
        const std::string key(record.key());
        stage.emit("{\"key\":\"" + key + "\",\"n\":" + std::to_string(next_number(stage, key)) + "}");
        if (counts_all)
            next_number(stage, "all of them");
    }
    stage.close();
} catch (const ags::Error &error) {
    std::fprintf(stderr, "counts: %s\n", error.what());
    return 1;
}
