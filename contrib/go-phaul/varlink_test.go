package relay

import (
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"
)

func TestACallAndItsReplyAreWhatTheInterfaceSays(t *testing.T) {
	calls := make(chan string, 1)
	daemon := standInFor(t, func(call call, connection *net.UnixConn) {
		calls <- call.text
		// A reply comes in as many pieces as it likes.
		for _, piece := range []string{`{"parameters":{"snapshot":{"id":"web","state":"pag`, `ed","reason":"","peer":`,
			`"host-b:9996","images":3,"bytes":5000000000,"begun_ms":1,"ended_ms":0},"images":[]}}`, "\x00"} {
			io.WriteString(connection, piece)
			time.Sleep(time.Millisecond)
		}
	})
	snapshot, err := daemon.Show(soon(t), "web")
	if err != nil {
		t.Fatal(err)
	}
	if want := (Snapshot{ID: "web", State: Paged, Peer: "host-b:9996", Images: 3, Bytes: 5000000000}); snapshot != want {
		t.Errorf("%+v", snapshot)
	}
	if got := <-calls; got != "{\"method\":\"org.criu.ImageRelay.Show\",\"parameters\":{\"id\":\"web\"}}\x00" {
		t.Errorf("%q", got)
	}
}

func TestADescriptorGoesWithTheCall(t *testing.T) {
	daemon := standInFor(t, func(call call, connection *net.UnixConn) {
		defer call.socket.Close()
		io.WriteString(call.socket, call.text)
		io.WriteString(connection, done)
	})
	ours, theirs, err := socketPair()
	if err != nil {
		t.Fatal(err)
	}
	if err := daemon.OpenPages(soon(t), "web", "host-b:9996", theirs); err != nil {
		t.Fatal(err)
	}
	theirs.Close()
	got, err := io.ReadAll(ours)
	want := "{\"method\":\"org.criu.ImageRelay.OpenPages\",\"parameters\":{\"id\":\"web\",\"to\":\"host-b:9996\"}}\x00"
	if err != nil || string(got) != want {
		t.Errorf("%q: %v", got, err)
	}
}

func TestWhatADaemonRefusesIsTold(t *testing.T) {
	show := func(reply string) error {
		_, err := standInFor(t, says(reply)).Show(soon(t), "web")
		return err
	}
	err := show(`{"error":"org.criu.ImageRelay.NoSuchSnapshot","parameters":{"id":"web"}}` + "\x00")
	if !errors.Is(err, ErrNoSuchSnapshot) || !strings.HasSuffix(err.Error(), `Show: no such snapshot: "web"`) {
		t.Errorf("%v", err)
	}
	err = show(`{"error":"org.criu.ImageRelay.Refused","parameters":{"reason":"in use"}}` + "\x00")
	var refused *RefusedError
	if !errors.As(err, &refused) || refused.Reason != "in use" {
		t.Errorf("%v", err)
	}
	for reply, want := range map[string]string{
		`{"error":"org.criu.ImageRelay.NoDescriptor"}` + "\x00": "org.criu.ImageRelay.NoDescriptor",
		"":                           "the daemon closed the connection",
		`{"parameters":{"snapshot":`: "the daemon closed the connection",
		"HTTP/1.1 400\x00":           "invalid character",
		`{"parameters":7}` + "\x00":  "cannot unmarshal",
		strings.Repeat(" ", 17<<20):  "a reply of more than 16777216 bytes",
	} {
		if err := show(reply); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.80q: %v", reply, err)
		}
	}
}

func TestNobodyAtTheSocketIsAnErrorThatNamesIt(t *testing.T) {
	if err := Daemon("/nonexistent/control.sock").Drop(soon(t), "web"); err == nil ||
		!strings.Contains(err.Error(), "/nonexistent/control.sock") {
		t.Errorf("%v", err)
	}
}

func TestWaitWholeFollowsTheStates(t *testing.T) {
	daemon := standInFor(t, func(call call, connection *net.UnixConn) {
		if !strings.Contains(call.text, `"more":true`) {
			t.Error(call.text)
		}
		last := State(call.id)
		for _, state := range []State{Awaited, Receiving, Paged, "of later daemons"} {
			io.WriteString(connection, inState(call.id, state, true))
		}
		io.WriteString(connection, inState(call.id, last, false))
	})
	for _, good := range []State{Whole, Taken} {
		if snapshot, err := daemon.WaitWhole(soon(t), string(good)); err != nil || snapshot.State != good {
			t.Errorf("%+v: %v", snapshot, err)
		}
	}
	var damaged *DamagedError
	if _, err := daemon.WaitWhole(soon(t), "damaged"); !errors.As(err, &damaged) || damaged.Reason != "why not" {
		t.Errorf("%v", err)
	}
	if _, err := daemon.WaitWhole(soon(t), "paged"); err == nil {
		t.Error("a watch that has ended too early was taken for a whole snapshot")
	}
}

func TestWaitingEndsWithItsContext(t *testing.T) {
	ended := make(chan struct{})
	daemon := standInFor(t, func(_ call, connection *net.UnixConn) {
		io.Copy(io.Discard, connection)
		close(ended)
	})
	enough := errors.New("enough")
	ctx, cancel := context.WithCancelCause(context.Background())
	time.AfterFunc(10*time.Millisecond, func() { cancel(enough) })
	if _, err := daemon.WaitWhole(ctx, "web"); !errors.Is(err, enough) {
		t.Errorf("%v", err)
	}
	<-ended
}
