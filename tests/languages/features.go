// What conform does not try: attributes, several inputs, an interrupted wait, a record that is kept too long. tests/languages.rs runs it.
package main

import (
	"argostreams"
	"errors"
	"fmt"
	"log"
	"os"
	"time"
)

func refused(record argostreams.Record) (is string) {
	defer func() {
		if recover() != nil {
			is = "refused"
		}
	}()
	record.Payload()
	return "readable"
}

func one(stage *argostreams.Stage) error {
	go stage.Interrupt()
	if stage.Next() || !errors.Is(stage.Err(), argostreams.ErrInterrupted) {
		return fmt.Errorf("not interrupted: %w", stage.Err())
	}
	if err := os.WriteFile(os.Args[1], nil, 0o600); err != nil {
		return err
	}
	how := argostreams.Options{Key: []byte("k"), EventTime: time.Unix(0, 5), Attributes: map[string][]byte{"hop": []byte("one"), "empty": {}}}
	inputs, kept, first := map[uint32]bool{}, "", argostreams.Record{}
	for stage.Next() {
		record := stage.Record()
		if len(inputs) == 0 {
			first = record
		} else {
			kept = refused(first)
		}
		inputs[record.Input()] = true
		if err := stage.EmitWith(record.Payload(), how); err != nil {
			return err
		}
	}
	return stage.EmitWith([]byte(fmt.Sprintf("inputs %d kept %s", len(inputs), kept)), how)
}

func other(stage *argostreams.Stage) error {
	for stage.Next() {
		record := stage.Record()
		empty := record.Attribute("empty")
		line := fmt.Sprintf("%s %t %t %s %d %s", record.Attribute("hop"), empty != nil && len(empty) == 0, record.Attribute("missing") == nil,
			record.Key(), record.EventTime().UnixNano(), record.Payload())
		if err := stage.Emit([]byte(line)); err != nil {
			return err
		}
	}
	return nil
}

func fails(stage *argostreams.Stage) error {
	for stage.Next() {
		record := stage.Record()
		var count uint32
		if _, err := fmt.Sscan(string(record.Payload()), &count); err != nil {
			return err
		}
		var err error
		if record.Attempts() < count {
			err = stage.Fail("not today")
		} else {
			err = stage.Emit(record.Payload())
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func main() {
	stage, err := argostreams.Open()
	if err != nil {
		log.Fatal(err)
	}
	switch stage.Name() {
	case "one":
		err = one(stage)
	case "fails":
		err = fails(stage)
	default:
		err = other(stage)
	}
	if err != nil {
		log.Fatal(err)
	}
	if err := stage.Close(); err != nil {
		log.Fatal(err)
	}
}
