// A sum for each key, kept in the stage's keyed state: {"key": "apple", "n": 3} adds 3 to that of its key. The sums are written at the
// end.
package main

import (
	"argostreams"
	"encoding/json"
	"log"
	"strconv"
)

func add(stage *argostreams.Stage, record argostreams.Record) error {
	var line struct{ N *int64 }
	if err := json.Unmarshal(record.Payload(), &line); err != nil || line.N == nil {
		return stage.Reject("there is no whole number n in it")
	}
	value, err := stage.Get(record.Key())
	if err != nil {
		return err
	}
	total, _ := strconv.ParseInt(string(value), 10, 64) // 0 for a key that is new
	return stage.Put(record.Key(), strconv.AppendInt(nil, total+*line.N, 10))
}

func main() {
	stage, err := argostreams.Open()
	if err != nil {
		log.Fatal(err)
	}
	for stage.Next() {
		if err := add(stage, stage.Record()); err != nil {
			log.Fatal(err)
		}
	}
	if stage.Err() == nil {
		err = stage.Items(func(key, total []byte) error { return stage.Emit(append(append(key, ' '), total...)) })
		if err != nil {
			log.Fatal(err)
		}
	}
	if err := stage.Close(); err != nil {
		log.Fatal(err)
	}
}
