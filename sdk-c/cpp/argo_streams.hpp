/*
 * A C++17 program as a step of an Argo Streams pipeline, over the C library (argo_streams.h; link argo_streams).
 *
 *     ags::Stage stage;                                      // throws ags::Error
 *     for (const ags::Record &record : stage)
 *         stage.emit(record.payload());
 *     stage.close();
 *
 * A record is finished when the loop asks for the next one; what was emitted and put for it counts together with that. Records are
 * received and finished in batches; a batch is as long as what 1 ms of work was before, so that a slow program still finishes each
 * record by itself. Bytes of a record (std::string_view) are shared memory, good until the loop asks for the next record. A Stage
 * belongs to one thread at a time; only interrupt() may come from another.
 *
 * If the loop is left by an exception, what was not finished comes again, to the next process.
 */
#ifndef ARGO_STREAMS_HPP
#define ARGO_STREAMS_HPP

#include <argo_streams.h>

#include <array>
#include <chrono>
#include <cstdint>
#include <exception>
#include <iterator>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace ags {

/* A call failed. status() is its number in argo_streams.h; status_class() is what to do about it, AGS_CLASS_TRY_AGAIN and its like. */
class Error : public std::runtime_error {
public:
    explicit Error(ags_status status) : std::runtime_error(words(status)), status_(status) {}
    Error(ags_status status, const std::string &sentence)
        : std::runtime_error(std::string(ags_status_name(status)) + ": " + sentence), status_(status) {}
    ags_status status() const noexcept { return status_; }
    int32_t status_class() const noexcept { return ags_status_class(status_); }

private:
    static std::string words(ags_status status)
    {
        const char *sentence = ags_last_error();
        const bool plain = ags_status_class(status) == AGS_CLASS_TRY_AGAIN || *sentence == 0;
        return std::string(ags_status_name(status)) + ": " + (plain ? ags_status_text(status) : sentence);
    }
    ags_status status_;
};

inline ags_bytes bytes(std::string_view from) noexcept
{
    return ags_bytes{from.data(), from.size()};
}

/* A record that was received. Owns nothing. */
class Record {
public:
    Record() = default;
    Record(const ags_record *record, const char *base) noexcept : record_(record), base_(base) {}
    std::string_view payload() const noexcept { return at(record_->offset, record_->len_bytes); }
    bool has_key() const noexcept { return (record_->flags & AGS_RECORD_KEYED) != 0; }
    std::string_view key() const noexcept { return at(record_->key_offset, record_->key_len_bytes); }
    int64_t event_time_ns() const noexcept { return record_->event_time_ns; }
    uint32_t input() const noexcept { return record_->input; }
    /* How often it failed before, see Stage::fail. */
    uint32_t attempts() const noexcept { return record_->attempts; }
    /* All that is known of it; see ags_record. */
    const ags_record &raw() const noexcept { return *record_; }
    std::optional<std::string_view> attribute(std::string_view name) const
    {
        ags_bytes value;
        const ags_status status = ags_attributes_find(bytes(at(record_->attributes_offset, record_->attributes_len_bytes)), bytes(name), &value);
        if (status != AGS_OK)
            throw Error(status);
        if (value.data == nullptr)
            return std::nullopt;
        return std::string_view(static_cast<const char *>(value.data), value.len_bytes);
    }

private:
    std::string_view at(uint64_t offset, uint64_t len) const noexcept { return len == 0 ? std::string_view() : std::string_view(base_ + offset, len); }
    const ags_record *record_ = nullptr;
    const char *base_ = nullptr;
};

class Stage {
    static constexpr uint32_t batch_records_max = 256;
    /* Far from what fills the shortest ring (256 KiB), so that the outputs of one more record have room. */
    static constexpr uint64_t pending_bytes_max = 32 * 1024;

public:
    /* Opens the stage that the agent keeps for this program; socket_path: nullptr is $AGS_SOCKET. Blocks. Throws Error. */
    explicit Stage(const char *socket_path = nullptr)
    {
        ags_stage_options options = AGS_STAGE_OPTIONS_INIT;
        options.flags = AGS_STAGE_TELL_INPUT_OVER;
        options.socket_path = socket_path;
        check(ags_stage_open(&options, &stage_));
    }
    Stage(const Stage &) = delete;
    Stage &operator=(const Stage &) = delete;
    /* Without close(): what is not finished comes again. Once the input is over, the end is left to the next process. */
    ~Stage()
    {
        if (stage_ != nullptr && !is_over_)
            ags_stage_close(stage_);
    }

    class Iterator {
    public:
        using iterator_category = std::input_iterator_tag;
        using value_type = Record;
        using difference_type = std::ptrdiff_t;
        using pointer = const Record *;
        using reference = const Record &;
        explicit Iterator(Stage *stage = nullptr) : stage_(stage) {}
        reference operator*() const noexcept { return stage_->current_; }
        pointer operator->() const noexcept { return &stage_->current_; }
        Iterator &operator++()
        {
            if (!stage_->next())
                stage_ = nullptr;
            return *this;
        }
        void operator++(int) { ++*this; }
        bool operator==(const Iterator &other) const noexcept { return stage_ == other.stage_; }
        bool operator!=(const Iterator &other) const noexcept { return stage_ != other.stage_; }

    private:
        Stage *stage_;
    };
    Iterator begin() { return next() ? Iterator(this) : end(); }
    Iterator end() noexcept { return Iterator(); }

    /* Emits a record that belongs to the record of the loop, and has its key and time. Blocks while there is no room. */
    void emit(std::string_view payload) { emit(payload, ags_emit AGS_EMIT_INIT); }
    /* With another key or time, or attributes: as in how, whose payload and belongs_to are not looked at. */
    void emit(std::string_view payload, ags_emit how, uint32_t output = AGS_OUTPUT_MAIN)
    {
        open();
        is_touched_ = true;
        how.payload = bytes(payload);
        how.belongs_to = has_current_ ? AGS_BELONGS_TO_NTH : AGS_BELONGS_TO_NOTHING;
        how.nth = has_current_ ? next_ - 1 - finished_ : 0;
        for (;;) {
            ags_status status = ags_stage_emit(stage_, output, &how);
            if (status == AGS_BATCH_FULL && !has_current_ && next_ == finished_ && pending_bytes_ > 0) {
                check(ags_stage_done(stage_, 0));
                pending_bytes_ = 0;
            } else if (status == AGS_AGAIN) {
                check(ags_stage_wait(stage_, AGS_FOREVER));
            } else {
                check(status);
                pending_bytes_ += payload.size() + 64;
                return;
            }
        }
    }
    /* Emits with this key. */
    void emit(std::string_view payload, std::string_view key)
    {
        ags_emit how = AGS_EMIT_INIT;
        how.key_choice = AGS_KEY_SET;
        how.key = bytes(key);
        emit(payload, how);
    }
    /* Sends the record of the loop as it came to the error output. */
    void reject(const char *reason)
    {
        open();
        if (!has_current_)
            throw Error(AGS_STATE, "there is no record to reject outside of the loop over the stage");
        is_touched_ = true;
        ags_status status;
        while ((status = ags_stage_reject(stage_, next_ - 1 - finished_, reason)) == AGS_AGAIN)
            check(ags_stage_wait(stage_, AGS_FOREVER));
        check(status);
        pending_bytes_ += current_.payload().size() + 64;
    }
    /* The record of the loop failed, for now: as the step's onError says it comes again later or goes to the error output, and the loop goes on.
       Call it before anything was emitted, put or erased for the record: AGS_STATE otherwise. Its views are not valid any more. */
    void fail(const char *reason)
    {
        open();
        if (!has_current_ || is_touched_)
            throw Error(AGS_STATE, has_current_ ? "something was emitted, put or erased for the record: fail it before" : "there is no record to fail outside of the loop over the stage");
        has_current_ = false;
        if (next_ - 1 > finished_)
            check(ags_stage_done(stage_, next_ - 1 - finished_));
        finished_ = next_ - 1;
        ags_status status;
        while ((status = ags_stage_fail(stage_, reason)) == AGS_AGAIN)
            check(ags_stage_wait(stage_, AGS_FOREVER));
        check(status);
        /* Those behind it were given back, and come again. */
        count_ = next_ = finished_ = 0;
        pending_bytes_ = 0;
    }
    /* The value of a key in the keyed state, as of the last put; good until the next get, put or erase. */
    std::optional<std::string_view> get(std::string_view key)
    {
        open();
        ags_bytes value;
        check(ags_stage_get(stage_, bytes(key), &value));
        if (value.data == nullptr)
            return std::nullopt;
        return std::string_view(static_cast<const char *>(value.data), value.len_bytes);
    }
    /* Sets the value of a key; counts with the record of the loop. */
    void put(std::string_view key, std::string_view value)
    {
        open();
        is_touched_ = true;
        ags_status status;
        while ((status = ags_stage_put(stage_, bytes(key), bytes(value))) == AGS_AGAIN)
            check(ags_stage_wait(stage_, AGS_FOREVER));
        check(status);
    }
    void erase(std::string_view key)
    {
        open();
        is_touched_ = true;
        ags_status status;
        while ((status = ags_stage_delete(stage_, bytes(key))) == AGS_AGAIN)
            check(ags_stage_wait(stage_, AGS_FOREVER));
        check(status);
    }
    /* Calls visit(key, value) for all of the keyed state, in no order. visit may put and erase. */
    template <typename Visit>
    void items(Visit visit)
    {
        open();
        ags_cursor cursor = AGS_CURSOR_INIT;
        while ((cursor.flags & AGS_CURSOR_OVER) == 0) {
            std::array<ags_entry, 64> entries;
            uint32_t count = 0;
            check(ags_stage_iterate(stage_, &cursor, entries.data(), 64, &count, &cursor));
            for (uint32_t at = 0; at < count; at++)
                visit(view(entries[at].key), view(entries[at].value));
        }
    }
    /* From any thread: the wait of the loop throws Error with AGS_INTERRUPTED. */
    void interrupt() noexcept { ags_stage_interrupt(stage_); }
    std::string_view name() const noexcept { return ags_stage_name(stage_); }
    /* Finishes the stage if its input is over, and frees it. */
    void close()
    {
        if (stage_ == nullptr)
            return;
        if (is_over_)
            check(ags_stage_done(stage_, 0));
        ags_stage_close(stage_);
        stage_ = nullptr;
        has_current_ = false;
    }
    /* For all other calls of argo_streams.h. */
    ags_stage *raw() noexcept { return stage_; }

private:
    static void check(ags_status status)
    {
        if (status != AGS_OK)
            throw Error(status);
    }
    static std::string_view view(const ags_bytes &from) { return from.len_bytes == 0 ? std::string_view() : std::string_view(static_cast<const char *>(from.data), from.len_bytes); }
    void open() const
    {
        if (stage_ == nullptr)
            throw Error(AGS_STATE, "the stage is closed");
    }
    void flush()
    {
        if (next_ > finished_)
            check(ags_stage_done(stage_, next_ - finished_));
        finished_ = next_;
        pending_bytes_ = 0;
    }
    bool fill()
    {
        using clock = std::chrono::steady_clock;
        if (count_ > 0) {
            if (clock::now() - begin_ > std::chrono::milliseconds(1))
                batch_max_ = batch_max_ > 1 ? batch_max_ / 2 : 1;
            else if (count_ == batch_max_ && batch_max_ < batch_records_max)
                batch_max_ *= 2;
            count_ = next_ = finished_ = 0;
        }
        for (;;) {
            const ags_status status = ags_stage_recv(stage_, records_.data(), batch_max_, &count_);
            if (status == AGS_OK)
                break;
            count_ = 0;
            if (status == AGS_INPUT_OVER || status == AGS_CLOSED) {
                is_over_ = true;
                return false;
            }
            check(status == AGS_AGAIN ? ags_stage_wait(stage_, AGS_FOREVER) : status);
        }
        begin_ = clock::now();
        return true;
    }
    bool next()
    {
        open();
        has_current_ = false;
        if (pending_bytes_ >= pending_bytes_max)
            flush();
        for (;;) {
            if (next_ == count_) {
                flush();
                if (is_over_ || !fill())
                    return false;
            }
            const ags_record &record = records_[next_++];
            if (record.type != AGS_RECORD_DATA)
                continue;
            current_ = Record(&record, base(record));
            has_current_ = true;
            is_touched_ = false;
            return true;
        }
    }
    const char *base(const ags_record &record)
    {
        if (record.input >= mappings_.size())
            mappings_.resize(record.input + 1);
        Mapping &mapping = mappings_[record.input];
        if (mapping.base == nullptr || mapping.generation != record.generation) {
            const void *at = nullptr;
            uint64_t len = 0;
            check(ags_stage_map(stage_, record.input, &at, &len));
            mapping = Mapping{static_cast<const char *>(at), record.generation};
        }
        return mapping.base;
    }
    struct Mapping {
        const char *base = nullptr;
        uint32_t generation = 0;
    };

    ags_stage *stage_ = nullptr;
    std::array<ags_record, batch_records_max> records_;
    uint32_t batch_max_ = 1, count_ = 0, next_ = 0, finished_ = 0;
    uint64_t pending_bytes_ = 0;
    std::chrono::steady_clock::time_point begin_;
    std::vector<Mapping> mappings_;
    Record current_;
    bool has_current_ = false, is_touched_ = false, is_over_ = false;
};

} // namespace ags

#endif /* ARGO_STREAMS_HPP */
