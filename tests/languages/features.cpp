// What conform does not try: attributes, several inputs, an interrupted wait. tests/languages.rs runs it.
#include <argo_streams.hpp>
#include <cstdio>
#include <fstream>
#include <set>
#include <thread>

int main(int, char **arguments)
try {
    ags::Stage stage;
    if (stage.name() == "one") {
        std::thread thread([&] { stage.interrupt(); });
        try {
            stage.begin();
        } catch (const ags::Error &error) {
            if (error.status() == AGS_INTERRUPTED)
                std::ofstream(arguments[1]).flush();
        }
        thread.join();
        char list[64];
        uint64_t used = 0;
        ags_attributes_append(list, sizeof list, used, ags::bytes("hop"), ags::bytes("one"), &used);
        ags_attributes_append(list, sizeof list, used, ags::bytes("empty"), ags::bytes(""), &used);
        ags_emit how = AGS_EMIT_INIT;
        how.flags = AGS_EMIT_EVENT_TIME;
        how.event_time_ns = 5;
        how.key_choice = AGS_KEY_SET;
        how.key = ags::bytes("k");
        how.attributes = ags::bytes(std::string_view(list, used));
        std::set<uint32_t> inputs;
        for (const ags::Record &record : stage) {
            inputs.insert(record.input());
            stage.emit(record.payload(), how);
        }
        stage.emit("inputs " + std::to_string(inputs.size()) + " kept unchecked", how);
    } else if (stage.name() == "fails") {
        for (const ags::Record &record : stage) {
            if (record.attempts() < std::stoul(std::string(record.payload())))
                stage.fail("not today");
            else
                stage.emit(record.payload());
        }
    } else {
        for (const ags::Record &record : stage) {
            std::string line(record.attribute("hop").value_or("none"));
            line += record.attribute("empty") == std::string_view() ? " true" : " false";
            line += record.attribute("missing") ? " false " : " true ";
            line += std::string(record.key()) + ' ' + std::to_string(record.event_time_ns()) + ' ' + std::string(record.payload());
            stage.emit(line);
        }
    }
    stage.close();
} catch (const ags::Error &error) {
    std::fprintf(stderr, "features: %s\n", error.what());
    return 1;
}
